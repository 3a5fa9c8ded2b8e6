/** The gallery: a card for each request, newest first. They come from this browser and from the server's list of jobs. */

import {ask, isGone} from "./api.js";
import {Card} from "./card.js";
import {fetchJob, listJobs, madeOf} from "./jobs.js";
import {find, onClick, save} from "./page.js";
import {entries, forget, keep} from "./store.js";
import {Viewer} from "./viewer.js";
import {zip} from "./zip.js";

const DOWNLOAD_TIMEOUT_MS = 600_000;

export class Gallery {
	/** @type {Map<Element, Card>} */
	#cards = new Map();
	/** Last job of the pages that the server has listed. */
	#last = "";
	#list = find("#gallery");
	#search = find("#search");

	/**
	 * @param {Form} form
	 * @param {Server} server
	 */
	constructor(form, server) {
		this.form = form;
		this.server = server;
		this.viewer = new Viewer(this);
		this.#search.addEventListener("input", () => this.#filter());
		this.#list.addEventListener("change", () => this.#showTools());
		onClick("#older", () => this.load());
		onClick("#unpick", () => this.#unpick());
		onClick("#compare-picked", () => this.viewer.show(this.#picked[0], this.#picked[1]));
		onClick("#edit-picked", () => this.#usePicked(files => form.add(files)));
		onClick("#save-picked", () => this.#usePicked(async files => save(await zip(files), "images.zip")));
	}

	/** Shows the stored requests, and resumes those that have not ended. */
	async open() {
		const stored = (await entries()).sort((one, other) => one.created - other.created);
		for (const entry of stored) this.#run(this.#add(entry));
		this.#showTools();
	}

	/** Shows the next page of the key's jobs that this browser does not know. */
	async load() {
		try {
			for (let found = 0, more = true; more && !found;) {
				const {data, has_more} = await listJobs(this.#last);
				more = has_more;
				this.#last = data.at(-1)?.id ?? "";
				find("#older").hidden = !more;
				for (const job of data) found += Number(await this.#show(job));
			}
		} catch (error) {
			this.#last = "";
			if (!isGone(error)) this.form.refuse(error); // the last job may have been deleted
		}
		this.#filter();
	}

	/**
	 * Shows a job of the server's list, unless it is known or has no image to show.
	 * @param {Job} job
	 */
	async #show({id, status, model, size, n, created_at, ended_at = 0}) {
		const isKnown = () => [...this.#cards.values()].some(({entry}) => entry.job === id);
		if (isKnown() || status === "failed" || status === "cancelled") return false;
		const images = status === "succeeded" ? await fetchJob(id).then(madeOf, () => []) : undefined;
		if (isKnown() || images?.length === 0) return false;
		const request = {model, size, n, ...(images && {prompt: images[0].prompt})};
		const times = {created: created_at * 1000, seconds: ended_at - created_at};
		this.#run(this.#add({id, job: id, ...times, request, sources: [], images, size}));
		return true;
	}

	/**
	 * @param {Fields} request
	 * @param {File[]} sources
	 */
	async make(request, sources) {
		const id = [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, "0"));
		const entry = {id: id.join(""), created: Date.now(), request, sources};
		await keep(entry);
		const card = this.#add(entry);
		this.#list.prepend(card.element); // whatever the server's clock
		this.#search.value = "";
		this.#filter();
		find("#images").scrollTo({top: 0});
		this.#run(card, true);
	}

	/**
	 * Does what a button of a card or of the viewer says.
	 * @param {string} action
	 * @param {Card} card
	 * @param {number} [index] the image; unset for all of the card
	 */
	async act(action, card, index) {
		const {request, sources, images} = card.entry;
		const made = images?.[index ?? 0];
		const {n, seed, ...fields} = request;
		const again = index === undefined && n ? {...fields, n} : fields;
		if (action === "remove") return card.delete();
		if (action === "vary") return this.make(made ? again : request, sources);
		if (action === "edit") return this.form.add(await this.#files([{card, index: index ?? 0}]));
		this.form.put(made ? {...again, seed: made.seed} : request, sources);
	}

	/** @param {Card} card */
	async remove(card) {
		const neighbour = card.element.nextElementSibling ?? card.element.previousElementSibling;
		const hadFocus = card.element.contains(document.activeElement);
		card.element.remove();
		this.#cards.delete(card.element);
		this.#showTools();
		this.showTitle();
		const next = neighbour?.querySelector("button:not([hidden], [disabled])") ?? find("#prompt");
		if (hadFocus) /** @type {HTMLElement} */ (next).focus();
		await forget(card.entry.id);
	}

	/** @returns {Shot[]} the images that are shown, in their order */
	get shots() {
		return [...this.#list.children].flatMap(element => {
			const card = this.#cards.get(element);
			if (!card || card.element.hidden) return [];
			return (card.entry.images ?? []).map((_, index) => ({card, index}));
		});
	}

	get #picked() {
		return this.shots.filter(({card, index}) => card.isPicked(index));
	}

	#unpick() {
		for (const box of this.#list.querySelectorAll("input")) box.checked = false;
		this.#showTools();
	}

	/** @param {(files: File[]) => unknown} use */
	async #usePicked(use) {
		try {
			await use(await this.#files(this.#picked));
			this.#unpick();
		} catch (error) {
			this.form.refuse(error);
		}
	}

	/** @param {Shot[]} shots */
	#files(shots) {
		return Promise.all(
			shots.map(async shot => {
				const made = imageOf(shot);
				const signal = AbortSignal.timeout(DOWNLOAD_TIMEOUT_MS);
				const blob = await (await ask(made.path, {signal})).blob();
				return new File([blob], nameOf(made), {type: blob.type});
			}),
		);
	}

	/** @param {Entry} entry */
	#add(entry) {
		const card = new Card(entry, this);
		const older = [...this.#list.children].find(one => (this.#cards.get(one)?.entry.created ?? 0) < entry.created);
		this.#list.insertBefore(card.element, older ?? null);
		this.#cards.set(card.element, card);
		return card;
	}

	/** @param {Card} card */
	async #run(card, isNew = false) {
		const refusal = await card.send();
		if (!refusal) return card.follow();
		if (!isNew) return card.end({problem: refusal.message});
		await card.leave();
		this.form.refuse(refusal);
	}

	/** Shows the cards whose prompts contain the words of the search. */
	#filter() {
		const words = this.#search.value.toLowerCase();
		for (const {element, entry} of this.#cards.values()) {
			element.hidden = !String(entry.request.prompt).toLowerCase().includes(words);
		}
		this.#showTools();
	}

	/** Shows the progress of the newest running request in the tab's title. */
	showTitle() {
		const running = [...this.#cards.values()].filter(({isRunning}) => isRunning);
		const [newest] = running.sort((one, other) => other.entry.created - one.entry.created);
		document.title = newest ? `${newest.progress} · GLM-Image` : "GLM-Image playground";
	}

	#showTools() {
		const {length} = this.#picked;
		find("#empty").hidden = this.#cards.size > 0;
		find("#tools").hidden = !this.#cards.size;
		find("#picked").hidden = !length;
		find("#picked-count").textContent = `${length} selected`;
		find("#compare-picked").hidden = length !== 2;
	}
}

/**
 * Returns the name of a downloaded image.
 * @param {Made} made
 */
export function nameOf({path, seed}) {
	return `image-${seed}.${path.split(".").at(-1)}`;
}

/** @param {Shot} shot */
export function imageOf({card, index}) {
	return /** @type {Made[]} */ (card.entry.images)[index];
}
