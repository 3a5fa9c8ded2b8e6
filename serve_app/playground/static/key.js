/** The API key: asked for when the server wants one, and kept in this tab alone. */

import { find } from "./page.js";

const STORED_AS = "api-key";

/** @type {Promise<boolean> | null} */
let asking = null;

/** @returns {string} empty if there is none */
export function key() {
  return sessionStorage.getItem(STORED_AS) ?? "";
}

/**
 * Ask for the key, once for all who want it at a time.
 * @param {string} reason why it is needed
 * @returns {Promise<boolean>} whether there is another one now
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
