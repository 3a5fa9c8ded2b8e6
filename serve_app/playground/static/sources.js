/** The source images, which the user chooses, drops or pastes, and can remove. */

import { copyOf, find } from "./page.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];

/** List of source images. Emits `change` after every change, and `refused` with the reason for a rejected file. */
export class Sources extends EventTarget {
  /** @type {File[]} */
  files = [];
  #most = 0;
  #fieldset = find("#sources");

  constructor() {
    super();
    /** @type {HTMLInputElement} */
    const input = find("#files");
    input.addEventListener("change", () => {
      this.add(input.files);
      input.value = "";
    });
    document.addEventListener("paste", (event) => {
      const data = event.clipboardData;
      if (!data?.files.length || data.types.includes("text/plain")) return; // office programs add an image to copied text
      event.preventDefault();
      this.add(data.files);
    });
    document.addEventListener("dragover", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.#fieldset.classList.add("dropping");
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) this.#fieldset.classList.remove("dropping");
    });
    document.addEventListener("drop", (event) => {
      this.#fieldset.classList.remove("dropping");
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.add(event.dataTransfer.files);
    });
  }

  /**
   * Adds images up to the model's limit.
   * @param {Iterable<File> | null} files
   */
  add(files) {
    for (const file of files ?? []) {
      if (!this.#most) this.#refuse("This model does not edit images. Choose another model.");
      else if (!KINDS.includes(file.type)) this.#refuse(`${file.name} is not a PNG, JPEG or WebP image.`);
      else if (this.files.length === this.#most) this.#refuse(`This model accepts at most ${inNumber(this.#most)}.`);
      else this.files.push(file);
    }
    this.#show();
  }

  /** @param {File[]} files */
  replace(files) {
    this.files = [];
    this.add(files);
  }

  /**
   * Sets the limit of images, and removes those above it.
   * @param {number} most
   */
  limit(most) {
    this.#most = most;
    this.#fieldset.hidden = !most;
    find("#max-sources").textContent = `at most ${inNumber(most)}`;
    if (this.files.length > most) this.files.length = most;
    this.#show();
  }

  /** @param {string} why */
  #refuse(why) {
    this.dispatchEvent(new CustomEvent("refused", { detail: why }));
  }

  #show() {
    const list = find("#source-list");
    for (const image of list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    list.replaceChildren(
      ...this.files.map((file, index) => {
        const item = copyOf("source");
        /** @type {HTMLImageElement} */
        const image = find("img", item);
        image.src = URL.createObjectURL(file);
        image.alt = file.name;
        const button = find("button", item);
        button.ariaLabel = `Remove ${file.name}`;
        button.addEventListener("click", () => {
          this.files.splice(index, 1);
          this.#show();
          find("#files").focus();
        });
        return item;
      }),
    );
    this.dispatchEvent(new Event("change"));
  }
}

/** @param {number} count */
function inNumber(count) {
  return count === 1 ? "one image" : `${count} images`;
}
