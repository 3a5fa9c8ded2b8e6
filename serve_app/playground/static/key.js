/** The API key: requested when the server needs one, and stored in this tab only. */

import {find} from "./page.js";

const STORED_AS = "api-key";

/** @type {Promise<boolean> | null} */
let asking = null;

/** Returns the key, or an empty string. */
export function key() {
	return sessionStorage.getItem(STORED_AS) ?? "";
}

export function useKey(given = "") {
	sessionStorage.setItem(STORED_AS, given);
}

/**
 * Asks the user for a key, and says why. Concurrent calls share one dialog.
 * @returns {Promise<boolean>} whether the user entered a key
 */
export function askForKey(reason = "") {
	asking ??= new Promise(resolve => {
		const [dialog, input] = [find("#key-dialog"), find("#key")];
		find("#key-reason").textContent = reason;
		find("#forget").hidden = !key();
		input.value = dialog.returnValue = "";
		dialog.onclose = () => {
			const given = dialog.returnValue === "use" ? input.value.trim() : "";
			if (given) useKey(given);
			if (dialog.returnValue === "forget") sessionStorage.removeItem(STORED_AS);
			input.value = "";
			asking = null;
			resolve(given !== "");
		};
		dialog.showModal();
	});
	return asking;
}
