/** The card of one request: its progress, then its images or its error. */

import { ServerError, ask } from "./api.js";
import { cancel, fetchJob, filePath, follow, hasEnded, purge, submit } from "./jobs.js";
import { FIRST_PAUSE_MS, announce, copyOf, duration, find, longer, messageOf, pause } from "./page.js";
import { update } from "./store.js";

/** @typedef {import("./jobs.js").Job} Job */
/** @typedef {import("./store.js").Entry} Entry */
/** @typedef {import("./store.js").Made} Made */

const SECOND_MS = 1000;
/** Status codes after which the same request can succeed later, or with another key. */
const RETRYABLE = [401, 408, 429];

export class Card {
  /** @type {Job | null} last known state of the job */
  #job = null;
  /** Message about a failure to send, follow or delete the request. */
  #trouble = "";
  /** Phase that was announced last. */
  #phase = "";
  #isGone = false;
  #isUnknown = false;

  /**
   * @param {Entry} entry
   * @param {import("./gallery.js").Gallery} gallery gallery that shows the card
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
   * Sends the request to the server, and retries until the server answers.
   * @returns {Promise<ServerError | null>} error if the server rejects the request
   */
  async send() {
    if (this.#hasEnded) return null;
    this.#tick();
    for (let tries = 0, wait = FIRST_PAUSE_MS; !this.entry.job && !this.#isGone; tries += 1) {
      try {
        this.#job = await submit(this.entry, { quietly: tries > 0 });
      } catch (error) {
        if (error instanceof ServerError && error.status < 500 && !RETRYABLE.includes(error.status)) return error;
        this.#trouble = `Not sent yet. ${messageOf(error)} The page retries automatically.`;
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

  /** Shows the progress until the job has ended. */
  async follow() {
    if (this.#hasEnded) return;
    try {
      for await (const event of follow(this.entry.job ?? "")) {
        if (this.#hasEnded) return;
        this.#trouble = event instanceof Error ? event.message : "";
        if (!(event instanceof Error)) await this.#handle(event);
        this.#show();
      }
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      this.#isUnknown = true;
      this.#trouble = "Request not found. It may have expired, or belong to another API key.";
      this.#show();
    }
  }

  /** Polls the job once, and shows its progress. */
  async poll() {
    if (this.#hasEnded) return;
    const job = await fetchJob(this.entry.job ?? "").catch(() => null); // following it later shows the error
    if (!job) return;
    await this.#handle(job);
    this.#show();
  }

  /**
   * Ends the request with an error.
   * @param {string} problem
   */
  async fail(problem) {
    await this.#end({ problem });
  }

  /** @param {Job} job */
  async #handle(job) {
    this.#job = job;
    if (this.#hasEnded) return;
    if (!hasEnded(job)) {
      const [phase] = this.#phaseAndProgress().split(":");
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

  /** @param {Partial<Entry>} result */
  async #end(result) {
    Object.assign(this.entry, result);
    this.#trouble = "";
    this.#show();
    announce(result.problem ?? `Ready: ${this.entry.request.prompt}`);
    await update(this.entry);
  }

  async #cancel() {
    if (!this.entry.job) return this.#leave();
    try {
      await this.#handle(await cancel(this.entry.job));
      this.#show();
    } catch (error) {
      this.#showError(error);
    }
  }

  async #delete() {
    const images = this.entry.images?.length === 1 ? "this image" : "these images";
    if (this.entry.images && !confirm(`Delete ${images} from this page and from the server?`)) return;
    try {
      if (this.entry.job) await purge(this.entry.job);
    } catch (error) {
      if (!(error instanceof ServerError && error.status === 404)) return this.#showError(error);
    }
    await this.#leave();
  }

  async #leave() {
    this.#isGone = true;
    await this.gallery.remove(this);
  }

  /** @param {unknown} error error of an action of the user */
  #showError(error) {
    this.#trouble = messageOf(error);
    this.#show();
    announce(this.#trouble);
  }

  /** Updates the elapsed time every second. */
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
    return `${this.#phaseAndProgress()} · ${duration(Math.max(0, Date.now() - created) / SECOND_MS)}`;
  }

  /** @returns {string} phase of the job, and its progress after a colon */
  #phaseAndProgress() {
    const job = this.#job;
    if (!job) return this.entry.job ? "Connecting" : "Sending";
    if (job.cancelling) return "Cancelling";
    if (job.waiting_for) return job.waiting_for;
    const ahead = job.queue_position ?? 0;
    const loading = this.gallery.server.loading(job.model);
    if (loading) return `Loading the model, which was not in memory: ${loading}`;
    if (job.status === "queued" && ahead) return `Queued: ${ahead} ${ahead === 1 ? "request" : "requests"} ahead`;
    if (job.status === "queued") return "Next in the queue";
    const image = job.images?.find(({ stage, done, total }) => stage !== "decoder" || done !== total);
    if (!image) return "Finishing";
    if (image.stage === "waiting") return "Waiting for a free slot";
    const part = `${image.done} of ${image.total}`;
    if (image.stage === "decoder") return `Painting: step ${part}`;
    return image.done === image.total ? "Waiting for the decoder" : `Prior: ${part} tokens`;
  }

  /** @param {number} index index of the image */
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
   * @param {number} index index of the image
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
      note.textContent = "The image could not be loaded. Reload the page to retry.";
      const isGone = await ask(made.path, { method: "HEAD" }).then(
        () => false,
        (error) => error instanceof ServerError && error.status === 404,
      );
      if (isGone) note.textContent = "The server has deleted this image. Use “Again” to generate it once more.";
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
