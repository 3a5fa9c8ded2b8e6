/** Jobs of the server. They continue if the page is closed or loses its connection. */

import {ask} from "./api.js";

const PATH = "v1/images/jobs";
const PREVIEWS = 3;
const UPLOAD_TIMEOUT_MS = 600_000;
const POLL_TIMEOUT_MS = 10_000;

/** Returns the path of a file on this server. Its URL may point to an object store, or be unreachable from here. */
export function filePath(url = "") {
	return `files/${new URL(url).pathname.split("/").at(-1)}`;
}

/**
 * Returns the images of a job that has succeeded, except those that are no files.
 * @param {Job} job
 * @returns {Made[]}
 */
export function madeOf({result}) {
	const files = result?.data.filter(({url}) => url) ?? [];
	return files.map(({url, seed, revised_prompt}) => ({path: filePath(url), seed, prompt: revised_prompt}));
}

/**
 * Submits a request. Submitting it again returns the same job.
 * @param {Entry} entry
 * @returns {Promise<Job>}
 */
export async function submit({id, request, sources}, quietly = false) {
	const fields = {...request, partial_images: PREVIEWS};
	/** @type {Record<string, string>} */
	const headers = {"Idempotency-Key": id};
	/** @type {string | FormData} */
	let body;
	if (sources.length) {
		body = new FormData();
		for (const [name, value] of Object.entries(fields)) body.append(name, String(value));
		for (const source of sources) body.append("image[]", source);
	} else {
		body = JSON.stringify(fields);
		headers["Content-Type"] = "application/json";
	}
	const signal = AbortSignal.timeout(UPLOAD_TIMEOUT_MS);
	return (await ask(PATH, {method: "POST", headers, body, signal, quietly})).json();
}

/**
 * Returns the page of the key's jobs that follows a job, the newest first, without their images.
 * @returns {Promise<{data: Job[], has_more: boolean}>}
 */
export async function listJobs(after = "") {
	return (await ask(`${PATH}${after && `?after=${after}`}`, {quietly: true})).json();
}

/** @returns {Promise<Job>} */
export async function fetchJob(id = "") {
	return (await ask(`${PATH}/${id}`, {quietly: true, signal: AbortSignal.timeout(POLL_TIMEOUT_MS)})).json();
}

/** @returns {Promise<Job>} */
export async function cancel(id = "") {
	return (await ask(`${PATH}/${id}`, {method: "DELETE"})).json();
}

/** Deletes an ended job and its images from the server. */
export async function purge(id = "") {
	await ask(`${PATH}/${id}/purge`, {method: "POST"});
}
