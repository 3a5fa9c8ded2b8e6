/** One request: how far it is, or its images, or why there are none. */

import { ServerError } from "./api.js";
import { cancel, filePath, follow, hasEnded, look, purge, submit } from "./jobs.js";
import { announce, copyOf, duration, find, inWords, pause } from "./page.js";
import { keep } from "./store.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./store.js").Entry} Entry */
/** @typedef {import("./store.js").Made} Made */

const AGAIN_MS = 2000;
const NOBODY_THERE = [502, 503, 504];
const SECOND_MS = 1000;

export class Card {
  /** @type {Job | null} what was last heard of it */
  #job = null;
  /** What keeps it from being heard of. */
  #trouble = "";
  #isGone = false;

  /**
   * @param {Entry} entry
   * @param {import("./gallery.js").Gallery} gallery that it is in
   */
  constructor(entry, gallery) {
    this.entry = entry;
    this.gallery = gallery;
    this.element = copyOf("card");
    const { form } = gallery;
    const count = Number(entry.request.n ?? 1);
    find(".images", this.element).replaceChildren(...Array.from({ length: count }, () => copyOf("tile")));
    find(".images", this.element).dataset.count = String(count);
    find(".prompt", this.element).textContent = String(entry.request.prompt);
    find(".cancel", this.element).addEventListener("click", () => this.#cancel());
    find(".again", this.element).addEventListener("click", () => {
      form.put({ ...entry.request, ...(entry.images && { seed: entry.images[0].seed }) }, entry.sources);
    });
    find(".delete", this.element).addEventListener("click", () => this.#delete());
    this.#show();
  }

  get #hasEnded() {
    return this.#isGone || Boolean(this.entry.images ?? this.entry.problem);
  }

  /**
   * Send the request to the server, however long it is not there.
   * @returns {Promise<boolean>} whether it has taken the request, and not made it yet
   */
  async send() {
    if (this.#hasEnded) return false;
    this.#tick();
    while (!this.entry.job && !this.#isGone) {
      try {
        this.#job = await submit(this.entry);
        this.entry.job = this.#job.id;
        await keep(this.entry);
        this.#trouble = "";
      } catch (error) {
        if (error instanceof ServerError && !NOBODY_THERE.includes(error.status)) {
          this.gallery.form.refuse(error);
          await this.#leave();
          return false;
        }
        this.#trouble = `Not sent yet. ${inWords(error)} It is sent again by itself.`;
        this.#show();
        await pause(AGAIN_MS);
      }
    }
    this.#show();
    return !this.#isGone;
  }

  /** Show how far it is now. */
  async look() {
    if (this.#hasEnded) return;
    try {
      await this.#hear(await look(this.entry.job ?? ""));
      this.#show();
    } catch {
      // It is followed before long, which tells what is the matter.
    }
  }

  /** Show how far it is until it has ended. */
  async follow() {
    if (this.#hasEnded) return;
    try {
      for await (const job of follow(this.entry.job ?? "")) {
        this.#trouble = job ? "" : "The connection is lost. The server goes on with it; connecting again…";
        if (job) await this.#hear(job);
        this.#show();
      }
    } catch (error) {
      await this.#end({ problem: inWords(error) });
    }
  }

  /** @param {Job} job */
  async #hear(job) {
    this.#job = job;
    if (!hasEnded(job) || this.#hasEnded) return;
    const seconds = (job.ended_at ?? 0) - job.created_at;
    if (job.status === "succeeded") {
      const images = job.result?.data.map(({ url, seed, revised_prompt }) => {
        return { path: filePath(url), seed, prompt: revised_prompt };
      });
      await this.#end({ images, size: job.size, seconds });
    } else {
      await this.#end({ problem: job.error?.message ?? "Cancelled.", seconds });
    }
  }

  /** @param {Partial<Entry>} how */
  async #end(how) {
    Object.assign(this.entry, how);
    await keep(this.entry);
    this.#show();
    announce(how.problem ?? `Ready: ${this.entry.request.prompt}`);
  }

  async #cancel() {
    if (!this.entry.job) return this.#leave();
    try {
      await this.#hear(await cancel(this.entry.job));
      this.#show();
    } catch (error) {
      this.#complain(error);
    }
  }

  async #delete() {
    const images = this.entry.images?.length === 1 ? "this image" : "these images";
    if (this.entry.images && !confirm(`Delete ${images}, here and on the server?`)) return;
    try {
      if (this.entry.job) await purge(this.entry.job);
    } catch (error) {
      if (!(error instanceof ServerError && error.status === 404)) return this.#complain(error);
    }
    await this.#leave();
  }

  async #leave() {
    this.#isGone = true;
    await this.gallery.remove(this);
  }

  /** @param {unknown} error that keeps from what was asked for */
  #complain(error) {
    this.#trouble = inWords(error);
    this.#show();
    announce(this.#trouble);
  }

  /** Keep the time that it takes up to date. */
  async #tick() {
    while (!this.#hasEnded) {
      this.#show();
      await pause(SECOND_MS);
    }
  }

  #show() {
    const { images, problem } = this.entry;
    const hasEnded = this.#hasEnded;
    this.element.dataset.state = images ? "made" : problem ? "failed" : "running";
    this.element.ariaBusy = String(!hasEnded);
    find(".words", this.element).textContent = this.#words();
    /** @type {HTMLButtonElement} */
    const cancelling = find(".cancel", this.element);
    cancelling.hidden = hasEnded;
    cancelling.disabled = Boolean(this.#job?.cancelling);
    find(".delete", this.element).hidden = !hasEnded;
    for (const [index, tile] of this.element.querySelectorAll(".tile").entries()) {
      if (images) this.#showImage(/** @type {HTMLButtonElement} */ (tile), images[index]);
      else this.#showProgress(/** @type {HTMLElement} */ (tile), index);
      /** @type {HTMLElement} */ (tile).hidden = Boolean(problem);
    }
  }

  #words() {
    const { images, problem, request, size, seconds, created } = this.entry;
    if (problem) return problem;
    if (images) {
      const facts = [request.model, size?.replace("x", "×"), `seed ${images[0].seed}`, `${seconds} s`];
      return facts.map((fact) => String(fact).replaceAll(" ", "\u00a0")).join(" · ");
    }
    return `${this.#doing()} · ${duration(Math.max(0, Date.now() - created) / SECOND_MS)}`;
  }

  /** @returns {string} what is being done for it */
  #doing() {
    const job = this.#job;
    if (this.#trouble) return this.#trouble;
    if (!job) return this.entry.job ? "Queued" : "Sending…";
    if (job.cancelling) return "Stopping…";
    const ahead = job.queue_position ?? 0;
    const loading = this.gallery.server.loading(job.model);
    if (loading) return `Loading the model, which was not in memory: ${loading}`;
    if (job.status === "queued" && ahead)
      return `Queued, ${ahead === 1 ? "one request" : `${ahead} requests`} before it`;
    if (job.status === "queued") return "Next in the queue";
    const image = job.images?.find(({ stage, done, total }) => stage !== "decoder" || done !== total);
    if (!image) return "Finishing";
    if (image.stage === "waiting") return "Waiting for a free place";
    const part = `${image.done} of ${image.total}`;
    if (image.stage === "decoder") return `Painting: step ${part}`;
    return image.done === image.total ? "Waiting for the decoder" : `Prior: ${part} tokens`;
  }

  /**
   * @param {HTMLElement} tile
   * @param {number} index of its image
   */
  #showProgress(tile, index) {
    const at = this.#job?.images?.[index];
    const done = (at?.done ?? 0) / (at?.total || 1);
    const parts = {
      prior: at?.stage === "decoder" ? 1 : at?.stage === "prior" ? done : 0,
      decoder: at?.stage === "decoder" ? done : 0,
    };
    for (const [stage, value] of Object.entries(parts)) {
      const bar = /** @type {HTMLProgressElement} */ (find(`.${stage}`, tile));
      bar.value = value;
      bar.ariaLabel = `Image ${index + 1}, ${stage} stage`;
    }
    tile.style.setProperty("--written", String(parts.prior));
    const preview = this.#job?.previews?.filter(({ image }) => image === index).at(-1);
    if (!preview) return;
    const image = /** @type {HTMLImageElement} */ (find("img", tile));
    const path = filePath(preview.url);
    if (image.getAttribute("src") !== path) image.src = path;
    image.alt = `Preview ${preview.index + 1}`;
    image.hidden = false;
  }

  /**
   * @param {HTMLButtonElement} tile
   * @param {Made} made
   */
  #showImage(tile, made) {
    const image = /** @type {HTMLImageElement} */ (find("img", tile));
    if (image.getAttribute("src") === made.path) return;
    image.loading = "lazy";
    image.src = made.path;
    image.alt = made.prompt;
    image.hidden = false;
    image.addEventListener("error", () => {
      tile.replaceChildren("The server has kept it for as long as it keeps images.");
      tile.disabled = true;
    });
    find(".bars", tile).hidden = true;
    tile.ariaLabel = `Open: ${made.prompt}, seed ${made.seed}`;
    tile.disabled = false;
    tile.addEventListener("click", () => this.gallery.viewer.show(this.entry, made));
  }
}
