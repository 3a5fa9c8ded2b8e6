/** The server's state, polled every two seconds while the page is visible. Polling loads no model. */

import {ServerError, ask} from "./api.js";
import {key} from "./key.js";
import {find, messageOf, onClick, pause} from "./page.js";

const POLL_INTERVAL_MS = 2000;
const POLL_TIMEOUT_MS = 10_000;
const UNLOAD_TIMEOUT_MS = 60_000;
/** Time after which a percentage that does not grow is no longer shown. */
const STALL_MS = 20_000;

export class Server {
	/** @type {Health | null} */
	#health = null;
	/** @type {Record<string, {share: number, moved: number}>} */
	#loaded = {};
	/** @type {string | null} key that the server rejected; empty if it rejected a request without one */
	#refused = null;

	constructor() {
		onClick("#unload", () => this.#unload());
		document.addEventListener("visibilitychange", () => this.#poll());
		this.#pollForever();
	}

	/** Returns words about a model that is loading; empty if it is loaded. */
	loading(model = "") {
		const stages = Object.values(this.#health?.models[model] ?? {});
		if (stages.every(isLoaded)) return "";
		const {share = 0, moved = 0} = this.#loaded[model] ?? {};
		return `Loading the model${Date.now() - moved < STALL_MS ? ` ${Math.floor(share * 100)} %` : ""}`;
	}

	/** Notes how much of each model is loaded, and when that grew last. */
	#noteLoading() {
		for (const [model, stages] of Object.entries(this.#health?.models ?? {})) {
			const all = Object.values(stages);
			const share = all.reduce((sum, stage) => sum + (isLoaded(stage) ? 1 : (stage.progress ?? 0)), 0) / all.length;
			const last = this.#loaded[model] ?? {share, moved: 0};
			const moved = share > last.share ? Date.now() : share < last.share ? 0 : last.moved;
			this.#loaded[model] = {share, moved};
		}
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
			this.#noteLoading();
			this.#showStages(this.#health);
			if (this.#refused === key()) return;
			const status = /** @type {Status} */ (await fetchState("v1/internal/status"));
			find("#operator").hidden = find("#unload").hidden = status.role === "user";
			show(...this.#describe(status));
		} catch (error) {
			if (!(error instanceof ServerError && error.status === 401)) {
				this.#health = this.#refused = null;
				return show("bad", "Unreachable", messageOf(error));
			}
			this.#refused = key();
			show("edge", "Needs a key", "Enter an API key to see the server's activity.");
		}
	}

	/**
	 * @param {Status} status
	 * @returns {[string, string, string]} color, short text and long text
	 */
	#describe({status, jobs_queued, units}) {
		const running = units.filter(({stage}) => stage !== "waiting").length;
		const queued = units.length - running + jobs_queued;
		const waiting = queued ? `, ${queued} waiting` : "";
		const stages = Object.values(this.#health?.models ?? {}).flatMap(model => Object.values(model));
		if (status === "generating") return ["warm", `Generating${waiting}`, `Images in progress: ${running}${waiting}.`];
		if (status === "loading") return ["warm", `Loading${waiting}`, `A model is loading${waiting}.`];
		if (stages.some(isLoaded)) return ["good", "Ready", "The server is ready and idle."];
		return ["edge", "Asleep", "No model is loaded. The first image takes longer."];
	}

	/** @param {Health} health */
	#showStages({models, safety_checker, prompt_expander, version}) {
		const all = {...models, "safety checker": {"": safety_checker}, "prompt expander": {"": prompt_expander}};
		find("#stages").replaceChildren(
			...Object.entries(all).flatMap(([model, stages]) => {
				return Object.entries(stages).flatMap(([stage, is]) => (is ? [row(model, stage, inShort(is))] : []));
			}),
		);
		find("#version").textContent = `version ${version}`;
	}

	/** Unloads all; `?force=true` cancels running images. */
	async #unload(query = "") {
		const [button, problem] = [find("#unload"), find("#unload-problem")];
		problem.textContent = "";
		button.disabled = true;
		try {
			const signal = AbortSignal.timeout(UNLOAD_TIMEOUT_MS);
			await ask(`v1/internal/unload${query}`, {method: "POST", signal});
		} catch (error) {
			const isBusy = error instanceof ServerError && error.own?.code === "generating";
			if (!isBusy) problem.textContent = messageOf(error);
			else if (confirm("Unloading now makes running and waiting images fail. Unload?"))
				await this.#unload("?force=true");
		}
		button.disabled = false;
		await this.#poll();
	}
}

async function fetchState(path = "") {
	return (await ask(path, {quietly: true, signal: AbortSignal.timeout(POLL_TIMEOUT_MS)})).json();
}

/** @param {Stage} stage */
function isLoaded({state}) {
	return state === "ready" || state === "generating";
}

/** @param {Stage} stage */
function inShort({state, replicas = 0, reason}) {
	return `${state}${replicas > 1 ? ` ×${replicas}` : ""}${reason ? `: ${reason}` : ""}`;
}

/** @param {string[]} texts */
function row(...texts) {
	const line = document.createElement("tr");
	for (const text of texts) line.insertCell().textContent = text;
	return line;
}

function show(color = "", words = "", more = "") {
	const state = find("#state");
	state.textContent = words;
	state.style.setProperty("--dot", `var(--${color})`);
	find("#server-doing").textContent = more;
}
