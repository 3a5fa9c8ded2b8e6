/** The source images, which the user chooses, drops or pastes, and can remove. */

import {copyOf, find} from "./page.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];

/** List of source images. Emits `change` after every change, and `refused` with the reason for a rejected file. */
export class Sources extends EventTarget {
	/** @type {File[]} */
	files = [];
	#most = 0;
	#words = "";
	#fieldset = find("#sources");

	constructor() {
		super();
		const input = find("#files");
		input.addEventListener("change", () => {
			this.add(input.files);
			input.value = "";
		});
		/** @type {(event: Event, data: DataTransfer | null) => void} */
		const take = (event, data) => {
			this.#fieldset.classList.remove("dropping");
			if (!data?.files.length) return;
			event.preventDefault();
			this.add(data.files);
		};
		document.addEventListener("paste", event => {
			const data = event.clipboardData;
			if (!data?.types.includes("text/plain")) take(event, data); // office programs add an image to copied text
		});
		document.addEventListener("drop", event => take(event, event.dataTransfer));
		document.addEventListener("dragover", event => {
			if (!event.dataTransfer?.types.includes("Files")) return;
			event.preventDefault();
			this.#fieldset.classList.add("dropping");
		});
		document.addEventListener("dragleave", ({relatedTarget}) => {
			if (!relatedTarget) this.#fieldset.classList.remove("dropping");
		});
	}

	/**
	 * Adds images up to the model's limit.
	 * @param {Iterable<File> | null} files
	 */
	add(files) {
		let refusal = "";
		for (const file of files ?? []) {
			if (!this.#most) refusal = "This model does not edit images. Choose another model.";
			else if (!KINDS.includes(file.type)) refusal = `${file.name} is not a PNG, JPEG or WebP image.`;
			else if (this.files.length === this.#most) refusal = `This model accepts ${this.#words}.`;
			else this.files.push(file);
		}
		this.#show();
		if (refusal) this.dispatchEvent(new CustomEvent("refused", {detail: refusal}));
	}

	/** @param {File[]} files */
	replace(files) {
		this.files = [];
		this.add(files);
	}

	/** Sets the limit of images, and removes those above it. */
	limit(most = 0) {
		this.#most = most;
		this.#fieldset.hidden = !most;
		this.#words = `at most ${most === 1 ? "one image" : `${most} images`}`;
		find("#max-sources").textContent = this.#words;
		this.files = this.files.slice(0, most);
		this.#show();
	}

	#show() {
		const list = find("#source-list");
		for (const {src} of list.querySelectorAll("img")) URL.revokeObjectURL(src);
		const items = this.files.map((file, index) => {
			const item = copyOf("source");
			Object.assign(find("img", item), {src: URL.createObjectURL(file), alt: file.name});
			const button = find("button", item);
			button.ariaLabel = `Remove ${file.name}`;
			button.addEventListener("click", () => {
				this.files.splice(index, 1);
				this.#show();
				find("#files").focus();
			});
			return item;
		});
		list.replaceChildren(...items);
		this.dispatchEvent(new Event("change"));
	}
}
