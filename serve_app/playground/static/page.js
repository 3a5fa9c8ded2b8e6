/** Helpers that the parts of the page share. */

/**
 * Returns the first element that matches a selector, and throws if there is none.
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} selector
 * @param {ParentNode} root
 * @returns {T}
 */
export function find(selector, root = document) {
  const found = root.querySelector(selector);
  if (!found) throw new Error(`No element matches ${selector}.`);
  return /** @type {T} */ (found);
}

/**
 * Returns a copy of a template's element.
 * @param {string} id
 * @returns {HTMLElement}
 */
export function copyOf(id) {
  const template = /** @type {HTMLTemplateElement} */ (find(`template#${id}`));
  return /** @type {HTMLElement} */ (template.content.firstElementChild?.cloneNode(true));
}

/**
 * Announces a message to screen readers.
 * @param {string} words
 */
export function announce(words) {
  find("#announcements").textContent = words;
}

/**
 * @param {number} seconds
 * @returns {string} duration in minutes and seconds
 */
export function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

/**
 * @param {number} milliseconds
 * @returns {Promise<void>}
 */
export function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** Pause before the first retry. */
export const FIRST_PAUSE_MS = 500;

/**
 * @param {number} milliseconds last pause
 * @returns {number} next pause, at most ten seconds
 */
export function longer(milliseconds) {
  return Math.min(milliseconds * 2, 10_000);
}

/**
 * @param {unknown} error
 * @returns {string}
 */
export function messageOf(error) {
  return error instanceof Error ? error.message : String(error);
}
