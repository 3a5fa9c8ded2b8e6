/** The card of one request: its progress, then its images or its error. */

import {ServerError, ask, isGone} from "./api.js";
import {cancel, fetchJob, filePath, madeOf, purge, submit} from "./jobs.js";
import {addActions, announce, copyOf, duration, find, messageOf, onClick, pause} from "./page.js";
import {update} from "./store.js";

const SECOND_MS = 1000;
const MAX_PAUSE_MS = 10_000;
/** Duration after which a run that ends in a hidden page is notified. */
const LONG_RUN_MS = 20_000;
/** Status codes after which the same request can succeed later, or with another key. */
const RETRYABLE = [401, 408, 429];

export class Card {
	element = copyOf("card");
	/** @type {HTMLElement[]} */
	#tiles = [];
	/** @type {Job | null} last known state of the job */
	#job = null;
	/** Message about a failure to send, follow or delete the request. */
	#trouble = "";
	/** Phase that was announced last. */
	#phase = "";
	/** @type {{at: number, steps: number} | undefined} denoising steps of all images that were done at first, and when */
	#first;
	/** Estimated time at which the last image is painted. */
	#ends = 0;
	#isGone = false;
	#isUnknown = false;

	/**
	 * @param {Entry} entry
	 * @param {Gallery} gallery gallery that shows the card
	 */
	constructor(entry, gallery) {
		this.entry = entry;
		this.gallery = gallery;
		const {element} = this;
		const count = Number(entry.request.n ?? 1);
		const columns = Math.ceil(Math.sqrt(count));
		for (let index = 0; index < count; index += 1) this.#addTile(index);
		find(".images", element).append(...this.#tiles);
		element.style.setProperty("--columns", String(columns));
		element.style.setProperty("--rows", String(Math.ceil(count / columns)));
		this.#setShape(String(entry.size ?? entry.request.size));
		onClick(".cancel", () => this.#cancel(), element);
		onClick(".notify", () => Notification.requestPermission().then(() => this.#show()), element);
		addActions(find(".actions", element), action =>
			gallery.act(action, this).catch(error => this.#show(messageOf(error))),
		);
		const prompt = find(".prompt", element);
		prompt.id = `prompt-${entry.id}`;
		element.setAttribute("aria-labelledby", prompt.id);
		for (const button of element.querySelectorAll(".actions button")) {
			button.setAttribute("aria-describedby", prompt.id);
		}
		this.#show();
	}

	/** Gives the images their place before they are loaded. */
	#setShape(size = "") {
		const [width, height] = size.split("x").map(Number);
		this.element.style.setProperty("--ratio", String(width / height || 1));
	}

	#addTile(index = 0) {
		const tile = copyOf("tile");
		find("progress", tile).ariaLabel = `Image ${index + 1}`;
		onClick(".open", () => this.gallery.viewer.show({card: this, index}), tile);
		this.#tiles.push(tile);
	}

	isPicked(index = 0) {
		return find("input", this.#tiles[index]).checked;
	}

	get isRunning() {
		return !this.#isGone && !this.#isUnknown && !this.entry.images && !this.entry.problem;
	}

	/**
	 * Sends the request to the server, and retries until the server answers.
	 * @returns {Promise<ServerError | null>} error if the server rejects the request
	 */
	async send() {
		if (this.isRunning) this.#tick();
		for (let tries = 0; !this.entry.job && this.isRunning; tries += 1) {
			try {
				this.#job = await submit(this.entry, tries > 0);
			} catch (error) {
				const isFinal = error instanceof ServerError && error.status < 500 && !RETRYABLE.includes(error.status);
				if (isFinal && (error.own || error.status !== 404)) return error;
				this.#show(`Not sent yet. ${messageOf(error)} The page retries.`);
				await pause(Math.min(MAX_PAUSE_MS, 500 * 2 ** tries));
				continue;
			}
			this.entry.job = this.#job.id;
			await (this.#isGone ? cancel(this.entry.job) : update(this.entry));
		}
		return null;
	}

	/** Shows the progress until the job has ended. Polls less often the longer it takes. */
	async follow() {
		for (let errors = 0; this.isRunning;) {
			try {
				await this.#handle(await fetchJob(this.entry.job ?? ""));
				errors = 0;
			} catch (error) {
				errors += 1;
				this.#isUnknown = isGone(error);
				const own = error instanceof ServerError && error.own && error.message;
				const words = this.#isUnknown && "Request not found. It may have expired, or belong to another API key.";
				this.#show(words || own || "The connection is lost. The server continues the request. Reconnecting…");
			}
			const seconds = (Date.now() - this.entry.created) / SECOND_MS;
			await pause(Math.min(MAX_PAUSE_MS, Math.max(500, Math.min(2000, seconds * 50)) * 2 ** errors));
		}
	}

	/** @param {Job} job */
	async #handle(job) {
		this.#job = job;
		if (!this.isRunning) return;
		this.#setShape(job.size);
		if (job.status === "queued" || job.status === "running") {
			this.#estimate();
			const [phase] = this.progress.split(/ [0-9]/);
			if (phase !== this.#phase) announce(`${phase}: ${this.entry.request.prompt}`);
			this.#phase = phase;
			return this.#show("");
		}
		const seconds = (job.ended_at ?? 0) - job.created_at;
		if (job.status !== "succeeded") return this.end({problem: job.error?.message ?? "Cancelled.", seconds});
		const images = madeOf(job);
		if (!images.length) return this.leave();
		this.entry.request.prompt ??= images[0].prompt;
		await this.end({images, size: job.size, seconds});
	}

	/** Estimates when the images are painted, by the pace of the steps so far. */
	#estimate() {
		const painted = this.#job?.images?.filter(({stage}) => stage === "decoder") ?? [];
		if (!painted.length) return;
		const steps = painted.reduce((sum, {done = 0}) => sum + done, 0);
		const all = (painted[0].total ?? 0) * this.#tiles.length;
		const at = Date.now();
		this.#first ??= {at, steps};
		if (steps > this.#first.steps)
			this.#ends = at + ((at - this.#first.at) / (steps - this.#first.steps)) * (all - steps);
	}

	/**
	 * Ends the request.
	 * @param {Partial<Entry>} result
	 */
	async end(result) {
		Object.assign(this.entry, result);
		this.#show("");
		const {problem, request, created} = this.entry;
		announce(problem ?? `Ready: ${request.prompt}`);
		if (document.hidden && Date.now() - created > LONG_RUN_MS) notify(problem ?? "Ready", String(request.prompt));
		await update(this.entry);
	}

	async #cancel() {
		if (!this.entry.job) return this.leave();
		try {
			await this.#handle(await cancel(this.entry.job));
		} catch (error) {
			this.#show(messageOf(error));
		}
	}

	/** Deletes the request and its images, here and on the server. */
	async delete() {
		const {images, job} = this.entry;
		if (images && !confirm("Delete this request and its images, here and on the server?")) return;
		try {
			if (job) await purge(job);
		} catch (error) {
			if (!isGone(error)) throw error;
		}
		await this.leave();
	}

	async leave() {
		this.#isGone = true;
		await this.gallery.remove(this);
	}

	async #tick() {
		while (this.isRunning) {
			this.#show();
			await pause(SECOND_MS);
		}
	}

	#show(trouble = this.#trouble) {
		this.#trouble = trouble;
		const {element, isRunning} = this;
		const {images, problem, request} = this.entry;
		element.dataset.state = images ? "made" : isRunning ? "running" : "failed";
		find(".prompt", element).textContent = String(request.prompt ?? "A request of another browser");
		find(".words", element).textContent = this.#words();
		const [alert, cancelling, vary] = [find(".trouble", element), find(".cancel", element), find(".vary", element)];
		if (alert.textContent !== trouble) alert.textContent = trouble; // screen readers read every change
		cancelling.hidden = !isRunning;
		cancelling.disabled = Boolean(this.#job?.cancelling);
		vary.textContent = images ? "Variation" : "Retry";
		vary.hidden = find(".remove", element).hidden = isRunning;
		find(".edit", element).hidden = images?.length !== 1;
		find(".images", element).hidden = Boolean(problem) || this.#isUnknown;
		find(".notify", element).hidden = !isRunning || globalThis.Notification?.permission !== "default";
		this.gallery.showTitle();
		for (const [index, tile] of this.#tiles.entries()) {
			if (images) this.#showImage(tile, images[index]);
			else this.#showProgress(tile, index);
		}
	}

	#words() {
		const {images, problem, request, size, seconds, created} = this.entry;
		if (problem) return problem;
		if (images) {
			const facts = [request.model, size?.replace("x", "×"), `seed ${images[0].seed}`, `${seconds} s`];
			return [...facts, this.gallery.form.hintOn(request)].filter(Boolean).join(" · ");
		}
		if (this.#isUnknown) return "";
		const {progress} = this;
		if (progress.endsWith("left")) return progress;
		return `${progress} · ${duration(Math.max(0, Date.now() - created) / SECOND_MS)}`;
	}

	/** Words about the progress. Those before the first digit name the phase. */
	get progress() {
		const job = this.#job;
		if (!job) return this.entry.job ? "Connecting" : "Sending";
		if (job.cancelling) return "Cancelling";
		if (job.waiting_for) return job.waiting_for;
		const ahead = job.queue_position ?? 0;
		const waits = (words = "") => this.gallery.server.loading(job.model) || words;
		if (job.status === "queued" && ahead) return waits(`Queued behind ${ahead} request${ahead > 1 ? "s" : ""}`);
		if (job.status === "queued") return waits("Next in the queue");
		const images = job.images ?? [];
		const at = images.findIndex(({stage, done, total}) => stage !== "decoder" || done !== total);
		if (at < 0) return "Finishing";
		const {stage, done = 0, total = 0} = images[at];
		const which = images.length > 1 ? ` (image ${at + 1} of ${images.length})` : "";
		if (stage === "waiting") return waits(`Waiting for a free place${which}`);
		if (stage === "prior" && done === total) return waits(`Waiting to be painted${which}`);
		if (stage === "prior") return `Planning ${Math.floor((100 * done) / total)} %${which}`;
		const left = (this.#ends - Date.now()) / SECOND_MS;
		return `Painting ${done} of ${total}${which}${left >= 1 ? `, about ${duration(left)} left` : ""}`;
	}

	/** @param {HTMLElement} tile */
	#showProgress(tile, index = 0) {
		const {stage, done = 0, total} = this.#job?.images?.[index] ?? {stage: "waiting"};
		const part = done / (total || 1);
		const isPainting = stage === "decoder";
		find("progress", tile).value = (Number(isPainting) + part) / 2;
		tile.style.setProperty("--written", String(isPainting ? 1 : part));
		const preview = this.#job?.previews?.filter(({image}) => image === index).at(-1);
		if (preview) showPicture(tile, filePath(preview.url), `Preview ${preview.index + 1}`);
	}

	/**
	 * @param {HTMLElement} tile
	 * @param {Made} made
	 */
	#showImage(tile, {path, prompt, seed}) {
		const image = showPicture(tile, path, prompt);
		if (!image) return;
		const [open, pick, note] = [find(".open", tile), find("input", tile), find(".note", tile)];
		image.onerror = async () => {
			image.hidden = open.hidden = pick.hidden = true;
			note.textContent = "The image could not be loaded. The page retries.";
			await pause(MAX_PAUSE_MS / 2);
			const isLost = await ask(path, {headers: {Range: "bytes=0-0"}}).then(() => false, isGone);
			if (isLost) note.textContent = "The server has deleted this image. “Reuse settings” can generate it once more.";
			else Object.assign(image, {loading: "eager", src: path}); // a hidden image is loaded, too
		};
		image.onload = () => {
			image.hidden = open.hidden = pick.hidden = false;
			note.textContent = "";
		};
		find("progress", tile).hidden = true;
		open.ariaLabel = `Open: ${prompt}, seed ${seed}`;
		pick.ariaLabel = `Select: ${prompt}, seed ${seed}`;
		open.hidden = pick.hidden = false;
	}
}

/**
 * Returns the image that shows a picture from now on, if it did not before.
 * @param {HTMLElement} tile
 */
function showPicture(tile, path = "", alt = "") {
	const image = find("img", tile);
	if (image.getAttribute("src") === path) return undefined;
	return Object.assign(image, {src: path, alt, hidden: false});
}

/** Shows a notification, if the user has allowed it. */
function notify(title = "", body = "") {
	if (globalThis.Notification?.permission !== "granted") return;
	try {
		new Notification(title, {body, icon: "playground/icon.svg"}).onclick = () => focus();
	} catch {
		// Some phones allow notifications to service workers only.
	}
}
