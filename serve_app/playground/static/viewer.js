/** The viewer: shows one image in full size, or two on top of each other, with parameters, actions and code. */

import {imageOf, nameOf} from "./gallery.js";
import {key} from "./key.js";
import {addActions, find, messageOf, onClick} from "./page.js";
import {snippet} from "./snippets.js";

export class Viewer {
	#dialog = find("#viewer");
	#stage = find("#stage");
	#image = find("#viewer-image");
	#before = find("#before");
	#split = find("#split");
	/** @type {Shot | undefined} */
	#shot;
	/** @type {Fields} request that generates this image only */
	#request = {};

	/** @param {Gallery} gallery */
	constructor(gallery) {
		this.gallery = gallery;
		this.#dialog.addEventListener("click", ({target}) => target === this.#dialog && this.#dialog.close()); // the backdrop
		this.#dialog.addEventListener("keydown", ({key, target}) => {
			if (target instanceof HTMLInputElement || this.#stage.tabIndex === 0) return; // arrow keys change or scroll it
			if (key === "ArrowLeft") this.#step(-1);
			if (key === "ArrowRight") this.#step(1);
		});
		this.#dialog.addEventListener("change", () => this.#showCode());
		this.#dialog.addEventListener("close", () => this.#compare());
		this.#split.addEventListener("input", () => this.#showSplit());
		addActions(find(".details .actions"), action => this.#act(action));
		onClick(".close", () => this.#dialog.close());
		onClick("#previous", () => this.#step(-1));
		onClick("#next", () => this.#step(1));
		for (const zoom of ["#zoom", "#viewer-image"]) onClick(zoom, () => this.#zoom(this.#stage.tabIndex < 0));
		onClick("#compare", () => this.#showSplit(find("#compare").ariaPressed === "false"));
		find("#copy").hidden = find("#copy-image").hidden = !navigator.clipboard; // offered with https and on localhost only
		onClick("#copy", () =>
			this.#copy("#copy", "text/plain", new Blob([find("#code").innerText], {type: "text/plain"})),
		);
		onClick("#copy-image", () => this.#copy("#copy-image", "image/png", this.#picture()));
	}

	/**
	 * @param {Shot} shot image to show
	 * @param {Shot} [before] image to compare it with; for an edit, the source image if unset
	 */
	show(shot, before) {
		const {entry} = shot.card;
		const made = imageOf(shot);
		const {n: _, ...request} = entry.request;
		this.#shot = shot;
		this.#request = {...request, seed: made.seed};
		Object.assign(find("#download"), {href: made.path, download: nameOf(made)});
		Object.assign(this.#image, {src: made.path, alt: made.prompt});
		const [source] = entry.sources;
		this.#compare(before ? imageOf(before).path : source && URL.createObjectURL(source));
		this.#zoom();
		find("#viewer-prompt").textContent = made.prompt;
		find("#viewer-problem").textContent = "";
		const took = entry.seconds && {took: `${entry.seconds} s`};
		const facts = Object.entries({...this.#request, size: entry.size?.replace("x", "×"), ...took});
		const terms = facts.flatMap(([name, value]) => {
			if (value === made.prompt) return [];
			const [term, description] = [document.createElement("dt"), document.createElement("dd")];
			term.textContent = name.replaceAll("_", " ").replace("num inference ", "");
			description.textContent = String(value);
			return [term, description];
		});
		find("#viewer-facts").replaceChildren(...terms);
		find("#previous").toggleAttribute("disabled", !this.#neighbour(-1));
		find("#next").toggleAttribute("disabled", !this.#neighbour(1));
		this.#showCode();
		if (!this.#dialog.open) this.#dialog.showModal();
	}

	#neighbour(step = 1) {
		const {shots} = this.gallery;
		const at = shots.findIndex(({card, index}) => card === this.#shot?.card && index === this.#shot.index);
		return shots[at + step];
	}

	#step(step = 1) {
		const next = this.#neighbour(step);
		if (next) this.show(next);
	}

	async #act(action = "") {
		const {card, index} = /** @type {Shot} */ (this.#shot);
		if (action !== "remove") this.#dialog.close();
		try {
			await this.gallery.act(action, card, index);
			if (!card.element.isConnected) this.#dialog.close();
		} catch (error) {
			if (!this.#dialog.open) return this.gallery.form.refuse(error);
			find("#viewer-problem").textContent = messageOf(error);
		}
	}

	/** Shows the whole image, or each of its pixels as one of the screen. */
	#zoom(isWhole = false) {
		this.#stage.tabIndex = isWhole ? 0 : -1; // the style sheet shows it
		find("#zoom").ariaPressed = String(isWhole);
		const {scrollWidth, clientWidth, scrollHeight, clientHeight} = this.#stage;
		this.#stage.scrollTo((scrollWidth - clientWidth) / 2, (scrollHeight - clientHeight) / 2);
	}

	/** Sets the image to compare with, if any. */
	#compare(path = "") {
		URL.revokeObjectURL(this.#before.src);
		if (path) this.#before.src = path;
		find("#compare").hidden = !path;
		this.#split.value = "50";
		this.#showSplit(path !== "");
	}

	/** Shows one image or both. */
	#showSplit(isShown = true) {
		this.#before.hidden = this.#split.hidden = !isShown;
		find("#compare").ariaPressed = String(isShown);
		this.#before.style.setProperty("--split", `${this.#split.value}%`);
	}

	/** @returns {Promise<Blob>} the image as a PNG, the only kind of image that browsers copy */
	#picture() {
		const {naturalWidth: width, naturalHeight: height} = this.#image;
		const canvas = Object.assign(document.createElement("canvas"), {width, height});
		canvas.getContext("2d")?.drawImage(this.#image, 0, 0);
		return new Promise(resolve => canvas.toBlob(blob => resolve(/** @type {Blob} */ (blob))));
	}

	/**
	 * @param {string} button
	 * @param {string} type
	 * @param {Blob | Promise<Blob>} what
	 */
	async #copy(button, type, what) {
		await navigator.clipboard.write([new ClipboardItem({[type]: what})]);
		find(button).textContent = "Copied";
	}

	#showCode() {
		const language = find("input:checked", this.#dialog).value;
		const sources = this.#shot?.card.entry.sources.length ?? 0;
		find("#code").textContent = snippet(language, this.#request, sources, key() !== "");
		find("#copy").textContent = "Copy";
		find("#copy-image").textContent = "Copy image";
	}
}
