/** One request: how far it is, or its images, or why there are none. */

import { ServerError, ask } from "./api.js";
import { cancel, filePath, follow, hasEnded, look, purge, submit } from "./jobs.js";
import { FIRST_PAUSE_MS, announce, copyOf, duration, find, inWords, longer, pause } from "./page.js";
import { update } from "./store.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./store.js").Entry} Entry */
/** @typedef {import("./store.js").Made} Made */

const SECOND_MS = 1000;
/** What the same request would be answered another time, with another key, or when there is room. */
const PASSING = [401, 408, 429];

export class Card {
  /** @type {Job | null} what was last heard of it */
  #job = null;
  /** What keeps it from being sent, heard of or deleted. */
  #trouble = "";
  /** What was last announced. */
  #phase = "";
  #isGone = false;
  #isUnknown = false;

  /**
   * @param {Entry} entry
   * @param {import("./gallery.js").Gallery} gallery that it is in
   */
  constructor(entry, gallery) {
    this.entry = entry;
    this.gallery = gallery;
    this.element = copyOf("card");
    const count = Number(entry.request.n ?? 1);
    const images = find(".images", this.element);
    images.replaceChildren(...Array.from({ length: count }, (_, index) => this.#tile(index)));
    images.dataset.count = String(count);
    const prompt = find(".prompt", this.element);
    prompt.textContent = String(entry.request.prompt);
    prompt.id = `prompt-${entry.id}`;
    this.element.setAttribute("aria-labelledby", prompt.id);
    for (const button of this.element.querySelectorAll(".actions button")) {
      button.setAttribute("aria-describedby", prompt.id);
    }
    find(".cancel", this.element).addEventListener("click", () => this.#cancel());
    find(".again", this.element).addEventListener("click", () => {
      const seed = entry.images && { seed: entry.images[0].seed };
      gallery.form.put({ ...entry.request, ...seed }, entry.sources);
    });
    find(".delete", this.element).addEventListener("click", () => this.#delete());
    this.#show();
  }

  get #hasEnded() {
    return this.#isGone || Boolean(this.entry.images ?? this.entry.problem);
  }

  /**
   * Send the request to the server, however long that is not there.
   * @returns {Promise<ServerError | null>} why it does not take the request, if it does not
   */
  async send() {
    if (this.#hasEnded) return null;
    this.#tick();
    for (let tries = 0, wait = FIRST_PAUSE_MS; !this.entry.job && !this.#isGone; tries += 1) {
      try {
        this.#job = await submit(this.entry, { quietly: tries > 0 });
      } catch (error) {
        if (error instanceof ServerError && error.status < 500 && !PASSING.includes(error.status)) return error;
        this.#trouble = `Not sent yet. ${inWords(error)} It is sent again by itself.`;
        this.#show();
        await pause(wait);
        wait = longer(wait);
        continue;
      }
      this.entry.job = this.#job.id;
      this.#trouble = "";
      await (this.#isGone ? cancel(this.entry.job) : update(this.entry));
    }
    this.#show();
    return null;
  }

  /** Show how far it is until it has ended. */
  async follow() {
    if (this.#hasEnded) return;
    try {
      for await (const told of follow(this.entry.job ?? "")) {
        if (this.#hasEnded) return;
        this.#trouble = told instanceof Error ? told.message : "";
        if (!(told instanceof Error)) await this.#hear(told);
        this.#show();
      }
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.#isUnknown = true;
      this.#trouble = "The server does not know this request, or no more, or it belongs to another API key.";
      this.#show();
    }
  }

  /** Show how far it is now. */
  async look() {
    if (this.#hasEnded) return;
    const job = await look(this.entry.job ?? "").catch(() => null); // to follow it tells what is the matter
    if (!job) return;
    await this.#hear(job);
    this.#show();
  }

  /**
   * End without images.
   * @param {string} problem
   */
  async fail(problem) {
    await this.#end({ problem });
  }

  /** @param {Job} job */
  async #hear(job) {
    this.#job = job;
    if (this.#hasEnded) return;
    if (!hasEnded(job)) {
      const [phase] = this.#doing().split(":");
      if (phase !== this.#phase) announce(`${phase}: ${this.entry.request.prompt}`);
      this.#phase = phase;
      return;
    }
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
    this.#trouble = "";
    this.#show();
    announce(how.problem ?? `Ready: ${this.entry.request.prompt}`);
    await update(this.entry);
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
    const isRunning = !this.#hasEnded && !this.#isUnknown;
    this.element.dataset.state = images ? "made" : isRunning ? "running" : "failed";
    find(".words", this.element).textContent = this.#words();
    find(".trouble", this.element).textContent = this.#trouble;
    /** @type {HTMLButtonElement} */
    const cancelling = find(".cancel", this.element);
    cancelling.hidden = !isRunning;
    cancelling.disabled = Boolean(this.#job?.cancelling);
    find(".delete", this.element).hidden = isRunning;
    find(".images", this.element).hidden = Boolean(problem) || this.#isUnknown;
    for (const [index, tile] of this.element.querySelectorAll(".tile").entries()) {
      if (images) this.#showImage(/** @type {HTMLElement} */ (tile), images[index]);
      else this.#showProgress(/** @type {HTMLElement} */ (tile), index);
    }
  }

  #words() {
    const { images, problem, request, size, seconds, created } = this.entry;
    if (problem) return problem;
    if (images) {
      const facts = [request.model, size?.replace("x", "×"), `seed ${images[0].seed}`, `${seconds} s`];
      return facts.map((fact) => String(fact).replaceAll(" ", "\u00a0")).join(" · ");
    }
    if (this.#isUnknown) return "";
    return `${this.#doing()} · ${duration(Math.max(0, Date.now() - created) / SECOND_MS)}`;
  }

  /** @returns {string} what is being done for it: a word or two, and perhaps a colon and how far it is */
  #doing() {
    const job = this.#job;
    if (!job) return this.entry.job ? "Asking" : "Sending";
    if (job.cancelling) return "Stopping";
    const ahead = job.queue_position ?? 0;
    const loading = this.gallery.server.loading(job.model);
    if (loading) return `Loading the model, which was not in memory: ${loading}`;
    if (job.status === "queued" && ahead) return `Queued: ${ahead === 1 ? "one is" : `${ahead} are`} before it`;
    if (job.status === "queued") return "Next in the queue";
    const image = job.images?.find(({ stage, done, total }) => stage !== "decoder" || done !== total);
    if (!image) return "Finishing";
    if (image.stage === "waiting") return "Waiting for a free place";
    const part = `${image.done} of ${image.total}`;
    if (image.stage === "decoder") return `Painting: step ${part}`;
    return image.done === image.total ? "Waiting for the decoder" : `Prior: ${part} tokens`;
  }

  /** @param {number} index of its image */
  #tile(index) {
    const tile = copyOf("tile");
    for (const stage of ["prior", "decoder"]) find(`.${stage}`, tile).ariaLabel = `Image ${index + 1}, ${stage} stage`;
    find(".open", tile).addEventListener("click", () => {
      if (this.entry.images) this.gallery.viewer.show(this.entry, this.entry.images[index]);
    });
    return tile;
  }

  /**
   * @param {HTMLElement} tile
   * @param {number} index of its image
   */
  #showProgress(tile, index) {
    const { stage, done = 0, total } = this.#job?.images?.[index] ?? { stage: "waiting" };
    const part = done / (total || 1);
    const parts = { prior: stage === "decoder" ? 1 : part, decoder: stage === "decoder" ? part : 0 };
    for (const [name, value] of Object.entries(parts)) {
      /** @type {HTMLProgressElement} */ (find(`.${name}`, tile)).value = value;
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
   * @param {HTMLElement} tile
   * @param {Made} made
   */
  #showImage(tile, made) {
    const image = /** @type {HTMLImageElement} */ (find("img", tile));
    if (image.getAttribute("src") === made.path) return;
    const [open, note] = [find(".open", tile), find(".note", tile)];
    image.addEventListener("error", async () => {
      image.hidden = open.hidden = true;
      note.textContent = "It could not be fetched. Reload the page to try again.";
      const isGone = await ask(made.path, { method: "HEAD" }).then(
        () => false,
        (error) => error instanceof ServerError && error.status === 404,
      );
      if (isGone) note.textContent = "The server does not have it any more. “Again” makes the same.";
    });
    image.loading = "lazy";
    image.src = made.path;
    image.alt = made.prompt;
    image.hidden = false;
    find(".bars", tile).hidden = true;
    open.ariaLabel = `Open: ${made.prompt}, seed ${made.seed}`;
    open.hidden = false;
  }
}
