/** Helpers that the parts of the page share. */

/**
 * Returns the first element that matches a selector, and throws if there is none.
 * @type {Find}
 */
export const find = (/** @type {string} */ selector, /** @type {ParentNode} */ root = document) => {
	const found = root.querySelector(selector);
	if (!found) throw new Error(`No element matches ${selector}.`);
	return /** @type {any} */ (found);
};

/** @type {(selector: string, action: () => unknown, root?: ParentNode) => void} */
export function onClick(selector, action, root) {
	find(selector, root).addEventListener("click", () => action());
}

/**
 * Adds the buttons that cards and the viewer share.
 * @type {(root: Element, act: (action: string) => unknown) => void}
 */
export function addActions(root, act) {
	const buttons = [...copyOf("actions").children];
	for (const button of buttons) button.addEventListener("click", () => act(button.className));
	root.append(...buttons);
}

/** Returns a copy of a template's element. */
export function copyOf(id = "") {
	const template = /** @type {HTMLTemplateElement} */ (find(`template#${id}`));
	return /** @type {HTMLElement} */ (template.content.firstElementChild?.cloneNode(true));
}

export function announce(words = "") {
	find("#announcements").textContent = words;
}

export function duration(seconds = 0) {
	const minutes = Math.floor(seconds / 60);
	return `${minutes ? `${minutes} min ` : ""}${Math.floor(seconds % 60)} s`;
}

/** @returns {Promise<void>} */
export function pause(milliseconds = 0) {
	return new Promise(resolve => setTimeout(resolve, milliseconds));
}

/** @param {unknown} error */
export function messageOf(error) {
	return error instanceof Error ? error.message : String(error);
}

/**
 * Saves a file on the user's machine.
 * @param {Blob} file
 */
export function save(file, name = "") {
	const link = Object.assign(document.createElement("a"), {href: URL.createObjectURL(file), download: name});
	link.click();
	setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // once the browser has read it
}
