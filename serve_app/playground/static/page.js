/** Small things that the parts of the page share. */

/**
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} selector of exactly what is in the page or below `root`
 * @param {ParentNode} root
 * @returns {T}
 */
export function find(selector, root = document) {
  const found = root.querySelector(selector);
  if (!found) throw new Error(`There is no ${selector}.`);
  return /** @type {T} */ (found);
}

/**
 * A copy of what a template holds.
 * @param {string} id
 * @returns {HTMLElement}
 */
export function copyOf(id) {
  const template = /** @type {HTMLTemplateElement} */ (find(`template#${id}`));
  return /** @type {HTMLElement} */ (template.content.firstElementChild?.cloneNode(true));
}

/**
 * Tell those who hear the page.
 * @param {string} words
 */
export function announce(words) {
  find("#announcements").textContent = words;
}

/**
 * @param {number} seconds
 * @returns {string} for people
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

/** The first pause before something is tried again. */
export const FIRST_PAUSE_MS = 500;

/**
 * @param {number} milliseconds that the last pause took
 * @returns {number} those of the next one, ten seconds at most
 */
export function longer(milliseconds) {
  return Math.min(milliseconds * 2, 10_000);
}

/**
 * @param {unknown} error
 * @returns {string}
 */
export function inWords(error) {
  return error instanceof Error ? error.message : String(error);
}
