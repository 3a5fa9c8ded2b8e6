/** The operator's page: stages, jobs, errors, usage and files of all keys, read every two seconds while it is visible. */

import {ServerError, ask} from "./api.js";
import {useKey} from "./key.js";
import {announce, duration, find, messageOf, onClick, pause, save} from "./page.js";

const PATH = "v1/internal/operator";
const POLL_INTERVAL_MS = 2000;
const PRIORITIES = ["normal", "low"];

/** @type {Record<string, string>} what each table shows, so that unchanged ones are left as they are */
const shown = {};

async function poll() {
	/** @type {Overview} */
	let overview;
	try {
		overview = await (await ask(PATH, {quietly: true})).json();
	} catch (error) {
		if (error instanceof ServerError && [401, 403].includes(error.status)) find("#key-form").hidden = false;
		return show("#problem", messageOf(error));
	}
	show("#problem");
	find("#key-form").hidden = true;
	fill("#stages", stages(overview));
	fill("#jobs", overview.jobs, job => [
		duration(job.age_s),
		job.key_id || "no key",
		job.api,
		job.model,
		`${job.n} × ${job.size}`,
		job.cancelling ? "cancelling" : job.state,
		job.state === "queued" ? priorityOf(job) : job.priority,
		job.id,
		cancelling(job),
	]);
	fill("#errors", overview.errors, ({at, status, code, key_id, api, request_id}) => [
		new Date(at * 1000).toLocaleString(),
		String(status),
		code,
		key_id || "no key",
		api,
		request_id,
	]);
	fill("#usage", overview.usage, ({day, key_id, source, requests, images, megapixel_steps}) => [
		day,
		key_id || "no key",
		source,
		...[requests, images, megapixel_steps].map(String),
	]);
	const {bytes, max_bytes} = overview.files;
	find("#kept").textContent = `${bytes === undefined ? "Not counted yet" : size(bytes)}, of at most ${size(max_bytes)}`;
}

/** @param {Overview} overview */
function stages({models, safety_checker, prompt_expander, replicas}) {
	const all = {...models, "safety checker": {helper: safety_checker}, "prompt expander": {helper: prompt_expander}};
	return Object.entries(all).flatMap(([model, stages]) =>
		Object.entries(stages).flatMap(([stage, is]) => {
			if (!is) return [];
			const theirs = replicas.filter(one => one.model === model && one.stage === stage);
			return [[model, stage, is.reason ? `${is.state}: ${is.reason}` : is.state, theirs.map(memory).join("; ")]];
		}),
	);
}

/** @param {Overview["replicas"][number]} replica */
function memory({device, memory: is}) {
	if (!is) return "not loaded yet";
	if (is.total === undefined) return `${device}: ${size(is.resident)}`;
	return `${device}: ${size(is.reserved)} of ${size(is.total)}, ${size(is.free)} free`;
}

function size(bytes = 0) {
	const [unit, name] = bytes < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
	return `${(bytes / unit).toFixed(1)} ${name}`;
}

/**
 * Fills a table, unless it would look the same.
 * @template T
 * @param {string} body selector of the table's body
 * @param {T[]} items
 * @param {(item: T) => (string | Node)[]} cellsOf
 */
function fill(body, items, cellsOf = item => /** @type {any} */ (item)) {
	const table = find(body);
	const state = JSON.stringify(items);
	if (shown[body] === state || table.contains(document.activeElement)) return;
	shown[body] = state;
	const rows = items.map(item => {
		const row = document.createElement("tr");
		for (const cell of cellsOf(item)) row.insertCell().append(cell);
		return row;
	});
	table.replaceChildren(...rows);
}

/** @param {Overview["jobs"][number]} job */
function priorityOf({id, priority}) {
	const select = document.createElement("select");
	select.append(...PRIORITIES.map(name => new Option(name, name, false, name === priority)));
	select.ariaLabel = `Priority of ${id}`;
	select.addEventListener("change", () => {
		const headers = {"Content-Type": "application/json"};
		change(id, {method: "PATCH", headers, body: JSON.stringify({priority: select.value})}, `is ${select.value} now`);
		select.blur();
	});
	return select;
}

/** @param {Overview["jobs"][number]} job */
function cancelling({id, key_id, cancelling}) {
	const button = document.createElement("button");
	button.textContent = "Cancel";
	button.ariaLabel = `Cancel ${id}`;
	button.disabled = cancelling;
	button.addEventListener("click", () => {
		button.blur();
		if (confirm(`Cancel job ${id} of ${key_id || "no key"}?`)) change(id, {method: "DELETE"}, "is being cancelled");
	});
	return button;
}

/** @type {(id: string, options: RequestInit & {headers?: Record<string, string>}, done: string) => Promise<void>} */
async function change(id, options, done) {
	await act(async () => {
		await ask(`${PATH}/jobs/${id}`, {...options, quietly: true});
		announce(`Job ${id} ${done}.`);
		await poll();
	});
}

/** @param {() => Promise<void>} action what a button does */
async function act(action) {
	show("#refusal");
	await action().catch(error => show("#refusal", messageOf(error)));
}

function show(selector = "", words = "") {
	const alert = find(selector);
	if (alert.textContent !== words) alert.textContent = words; // screen readers read every change
}

find("#key-form").addEventListener("submit", event => {
	event.preventDefault();
	useKey(find("#key").value.trim());
	find("#key").value = "";
	poll();
});
onClick("#csv", () =>
	act(async () => save(await (await ask(`${PATH}/usage.csv`, {quietly: true})).blob(), "usage.csv")),
);
for (;;) {
	if (!document.hidden) await poll();
	await pause(POLL_INTERVAL_MS);
}
