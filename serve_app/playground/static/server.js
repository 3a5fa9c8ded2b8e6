/** What the server is doing, looked at every two seconds while somebody sees the page: that wakes no model. */

import { ServerError, ask } from "./api.js";
import { key } from "./key.js";
import { find, inWords, pause } from "./page.js";

/** @typedef {import("./api.js").Health} Health */
/** @typedef {import("./api.js").Stage} Stage */
/** @typedef {import("./api.js").Status} Status */

const LOOK_MS = 2000;
const LONGEST_LOOK_MS = 10_000;
const LONGEST_UNLOAD_MS = 60_000;

export class Server {
  /** @type {Health | null} */
  #health = null;
  /** @type {string | null} the key, or its lack, with which the server does not tell what it is doing */
  #refused = null;

  constructor() {
    find("#unload").addEventListener("click", () => this.#unload(false));
    find("#unload-anyway").addEventListener("click", () => this.#unload(true));
    document.addEventListener("visibilitychange", () => this.#look());
    this.#lookOften();
  }

  /**
   * @param {string} model
   * @returns {string} how far its stages are with loading for somebody who waits; empty if they have loaded
   */
  loading(model) {
    const stages = Object.entries(this.#health?.models[model] ?? {});
    if (stages.every(([, stage]) => isLoaded(stage))) return "";
    return stages
      .map(([name, stage]) => `${name} ${stage.state === "unloaded" ? "starting" : inShort(stage)}`)
      .join(", ");
  }

  async #lookOften() {
    for (;;) {
      await this.#look();
      await pause(LOOK_MS);
    }
  }

  async #look() {
    if (document.hidden) return;
    try {
      this.#health = /** @type {Health} */ (await look("health"));
    } catch (error) {
      this.#health = null;
      show("away", "Not reached", inWords(error));
      return;
    }
    this.#showStages(this.#health);
    if (this.#refused === key()) return this.#showLocked();
    try {
      const status = /** @type {Status} */ (await look("v1/internal/status"));
      show(...this.#doing(status));
    } catch (error) {
      if (error instanceof ServerError && error.status === 401) {
        this.#refused = key();
        this.#showLocked();
      } else show("away", "Not reached", inWords(error));
    }
  }

  #showLocked() {
    show("locked", "Needs a key", "What it is doing is told to those who have an API key.");
  }

  /**
   * @param {Status} status
   * @returns {[string, string, string]} a word for the style, one for people, and more of them
   */
  #doing({ status, jobs_queued, units }) {
    const running = units.filter(({ stage }) => stage !== "waiting").length;
    const queued = units.length - running + jobs_queued;
    const waiting = queued ? `, ${queued} waiting` : "";
    const stages = Object.values(this.#health?.models ?? {}).flatMap((model) => Object.values(model));
    if (status === "generating") {
      return ["generating", `Generating${waiting}`, `Images: ${running} being made${waiting}.`];
    }
    if (status === "loading") return ["loading", `Loading${waiting}`, `A model is being loaded${waiting}.`];
    if (stages.some(isLoaded)) return ["ready", "Ready", "Ready, and nothing to do."];
    return ["unloaded", "Asleep", "No model is loaded, so that the first image takes longer."];
  }

  /** @param {Health} health */
  #showStages({ models, safety_checker, prompt_expander }) {
    const rows = Object.entries(models).flatMap(([model, stages]) => {
      return Object.entries(stages).map(([stage, is]) => row(model, stage, is));
    });
    if (safety_checker) rows.push(row("safety checker", "", safety_checker));
    if (prompt_expander) rows.push(row("prompt expander", "", prompt_expander));
    find("#stages").replaceChildren(...rows);
  }

  /** @param {boolean} force whether running images are stopped */
  async #unload(force) {
    const [problem, anyway] = [find("#unload-problem"), find("#unload-anyway")];
    /** @type {HTMLButtonElement} */
    const button = find("#unload");
    problem.textContent = "";
    button.disabled = true;
    try {
      await ask(`v1/internal/unload${force ? "?force=true" : ""}`, {
        method: "POST",
        signal: AbortSignal.timeout(LONGEST_UNLOAD_MS),
      });
      anyway.hidden = true;
    } catch (error) {
      const isBusy = error instanceof ServerError && error.code === "generating";
      problem.textContent = isBusy ? "Images are being made or wait for it; they would fail." : inWords(error);
      anyway.hidden = !isBusy;
    }
    button.disabled = false;
    if (force) button.focus();
    await this.#look();
  }
}

/**
 * @param {string} path
 * @returns {Promise<unknown>}
 */
async function look(path) {
  return (await ask(path, { quietly: true, signal: AbortSignal.timeout(LONGEST_LOOK_MS) })).json();
}

/** @param {Stage} stage */
function isLoaded({ state }) {
  return state === "ready" || state === "generating";
}

/** @param {Stage} stage */
function inShort({ state, progress }) {
  return state === "loading" && progress !== undefined ? `${Math.floor(progress * 100)} %` : state;
}

/**
 * @param {string} model
 * @param {string} stage
 * @param {Stage} is
 */
function row(model, stage, is) {
  const line = document.createElement("tr");
  const replicas = (is.replicas ?? 0) > 1 ? ` ×${is.replicas}` : "";
  const state = is.state === "loading" && is.progress !== undefined ? `loading ${inShort(is)}` : is.state;
  for (const text of [model, stage, `${state}${replicas}${is.reason ? `: ${is.reason}` : ""}`]) {
    line.insertCell().textContent = text;
  }
  return line;
}

/**
 * @param {string} state
 * @param {string} words
 * @param {string} more
 */
function show(state, words, more) {
  find("#state").dataset.state = state;
  find("#state-words").textContent = words;
  find("#server-doing").textContent = more;
}
