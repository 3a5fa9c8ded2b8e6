/** The API key: requested when the server needs one, and stored in this tab only. */

import { find } from "./page.js";

const STORED_AS = "api-key";

/** @type {Promise<boolean> | null} */
let asking = null;

/** @returns {string} the key, or an empty string */
export function key() {
  return sessionStorage.getItem(STORED_AS) ?? "";
}

/**
 * Asks the user for a key. Concurrent calls share one dialog.
 * @param {string} reason reason that the dialog shows
 * @returns {Promise<boolean>} whether the user entered a key
 */
export function askForKey(reason) {
  asking ??= ask(reason).finally(() => {
    asking = null;
  });
  return asking;
}

/**
 * @param {string} reason
 * @returns {Promise<boolean>}
 */
function ask(reason) {
  /** @type {HTMLDialogElement} */
  const dialog = find("#key-dialog");
  /** @type {HTMLInputElement} */
  const input = find("#key");
  find("#key-reason").textContent = reason;
  find("#forget").hidden = !key();
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use" ? input.value.trim() : "";
        if (given) sessionStorage.setItem(STORED_AS, given);
        if (dialog.returnValue === "forget") sessionStorage.removeItem(STORED_AS);
        input.value = "";
        resolve(given !== "");
      },
      { once: true },
    );
  });
}
