/** The server's state, polled every two seconds while the page is visible. Polling loads no model. */

import { ServerError, ask } from "./api.js";
import { key } from "./key.js";
import { find, messageOf, pause } from "./page.js";

/** @typedef {import("./api.js").Health} Health */
/** @typedef {import("./api.js").Stage} Stage */
/** @typedef {import("./api.js").Status} Status */

const POLL_INTERVAL_MS = 2000;
const POLL_TIMEOUT_MS = 10_000;
const UNLOAD_TIMEOUT_MS = 60_000;

export class Server {
  /** @type {Health | null} */
  #health = null;
  /** @type {string | null} key that the server rejected; empty if it rejected a request without one */
  #refused = null;

  constructor() {
    find("#unload").addEventListener("click", () => this.#unload(false));
    find("#unload-anyway").addEventListener("click", () => this.#unload(true));
    document.addEventListener("visibilitychange", () => this.#poll());
    this.#pollForever();
  }

  /**
   * @param {string} model
   * @returns {string} loading progress of the model's stages; empty if all are loaded
   */
  loading(model) {
    const stages = Object.entries(this.#health?.models[model] ?? {});
    if (stages.every(([, stage]) => isLoaded(stage))) return "";
    return stages
      .map(([name, stage]) => `${name} ${stage.state === "unloaded" ? "starting" : inShort(stage)}`)
      .join(", ");
  }

  async #pollForever() {
    for (;;) {
      await this.#poll();
      await pause(POLL_INTERVAL_MS);
    }
  }

  async #poll() {
    if (document.hidden) return;
    try {
      this.#health = /** @type {Health} */ (await fetchState("health"));
    } catch (error) {
      this.#health = null;
      show("away", "Unreachable", messageOf(error));
      return;
    }
    find("#version").textContent = `Server version ${this.#health.version}`;
    this.#showStages(this.#health);
    if (this.#refused === key()) return this.#showLocked();
    try {
      const status = /** @type {Status} */ (await fetchState("v1/internal/status"));
      show(...this.#describe(status));
    } catch (error) {
      if (error instanceof ServerError && error.status === 401) {
        this.#refused = key();
        this.#showLocked();
      } else show("away", "Unreachable", messageOf(error));
    }
  }

  #showLocked() {
    show("locked", "Needs a key", "Enter an API key to see the server's activity.");
  }

  /**
   * @param {Status} status
   * @returns {[string, string, string]} state for the style sheet, short text and long text
   */
  #describe({ status, jobs_queued, units }) {
    const running = units.filter(({ stage }) => stage !== "waiting").length;
    const queued = units.length - running + jobs_queued;
    const waiting = queued ? `, ${queued} waiting` : "";
    const stages = Object.values(this.#health?.models ?? {}).flatMap((model) => Object.values(model));
    if (status === "generating") {
      return ["generating", `Generating${waiting}`, `Images in progress: ${running}${waiting}.`];
    }
    if (status === "loading") return ["loading", `Loading${waiting}`, `A model is loading${waiting}.`];
    if (stages.some(isLoaded)) return ["ready", "Ready", "The server is ready and idle."];
    return ["unloaded", "Asleep", "No model is loaded. The first image takes longer."];
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

  /** @param {boolean} force whether running images are cancelled */
  async #unload(force) {
    const [problem, anyway] = [find("#unload-problem"), find("#unload-anyway")];
    /** @type {HTMLButtonElement} */
    const button = find("#unload");
    problem.textContent = "";
    button.disabled = true;
    try {
      await ask(`v1/internal/unload${force ? "?force=true" : ""}`, {
        method: "POST",
        signal: AbortSignal.timeout(UNLOAD_TIMEOUT_MS),
      });
      anyway.hidden = true;
    } catch (error) {
      const isBusy = error instanceof ServerError && error.code === "generating";
      problem.textContent = isBusy ? "Unloading now would make running and waiting images fail." : messageOf(error);
      anyway.hidden = !isBusy;
    }
    button.disabled = false;
    if (force) button.focus();
    await this.#poll();
  }
}

/**
 * @param {string} path
 * @returns {Promise<unknown>}
 */
async function fetchState(path) {
  return (await ask(path, { quietly: true, signal: AbortSignal.timeout(POLL_TIMEOUT_MS) })).json();
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
