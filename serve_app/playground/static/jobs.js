/** Jobs of the server. They continue if the page is closed or loses its connection. */

import { ServerError, ask } from "./api.js";
import { FIRST_PAUSE_MS, longer, pause } from "./page.js";

/** @typedef {import("./store.js").Entry} Entry */

/**
 * @typedef {object} Job
 * @property {string} id
 * @property {"queued" | "running" | "succeeded" | "failed" | "cancelled"} status
 * @property {string} model
 * @property {string} size
 * @property {number} n
 * @property {number} created_at
 * @property {number} [started_at]
 * @property {number} [ended_at]
 * @property {number} [queue_position]
 * @property {string} [waiting_for]
 * @property {boolean} [cancelling]
 * @property {{message: string}} [error]
 * @property {{stage: "waiting" | "prior" | "decoder", done?: number, total?: number}[]} [images]
 * @property {{image: number, index: number, url: string}[]} [previews]
 * @property {{data: {url: string, seed: number, revised_prompt: string}[]}} [result]
 */

const PATH = "v1/images/jobs";
const PREVIEWS = 3;
const UPLOAD_TIMEOUT_MS = 600_000;
/** Silence after which a connection counts as lost. The server sends something every 15 seconds. */
const SILENCE_MS = 40_000;

/** @param {Job} job */
export function hasEnded(job) {
  return job.status !== "queued" && job.status !== "running";
}

/**
 * Returns the path of a file on this server. Its URL may point to an object store, or be unreachable from here.
 * @param {string} url
 */
export function filePath(url) {
  return `files/${new URL(url).pathname.split("/").at(-1)}`;
}

/**
 * Submits a request. Submitting it again returns the same job.
 * @param {Entry} entry
 * @param {{quietly: boolean}} options `quietly`: do not ask the user for a key
 * @returns {Promise<Job>}
 */
export async function submit({ id, request, sources }, { quietly }) {
  const fields = { ...request, partial_images: PREVIEWS };
  /** @type {Record<string, string>} */
  const headers = { "Idempotency-Key": id };
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
  return (await ask(PATH, { method: "POST", headers, body, signal, quietly })).json();
}

/** @param {string} id @returns {Promise<Job>} */
export async function fetchJob(id) {
  return (await ask(`${PATH}/${id}`, { quietly: true })).json();
}

/** @param {string} id @returns {Promise<Job>} */
export async function cancel(id) {
  return (await ask(`${PATH}/${id}`, { method: "DELETE" })).json();
}

/**
 * Deletes an ended job and its images from the server.
 * @param {string} id
 */
export async function purge(id) {
  await ask(`${PATH}/${id}/purge`, { method: "POST" });
}

/**
 * Yields a job after every change until it has ended, and errors in between. Disconnects while the page is hidden,
 * because all tabs of a browser share six connections to a server.
 * @param {string} id
 * @returns {AsyncGenerator<Job | Error, void>}
 * @throws {ServerError} 404 if the job does not exist or belongs to another key
 */
export async function* follow(id) {
  for (let wait = FIRST_PAUSE_MS; ; wait = longer(wait)) {
    await visible();
    const connection = new AbortController();
    const { signal } = connection;
    const hangUp = () => connection.abort();
    let alarm = setTimeout(hangUp, SILENCE_MS);
    let trouble = new Error("The connection is lost. The server continues the request. Reconnecting…");
    document.addEventListener("visibilitychange", hangUp, { signal });
    try {
      const { body } = await ask(`${PATH}/${id}/events`, { signal, quietly: true });
      for await (const event of events(body, () => {
        clearTimeout(alarm);
        alarm = setTimeout(hangUp, SILENCE_MS);
      })) {
        if (event.event === "error") break;
        const job = /** @type {Job} */ (JSON.parse(event.data ?? ""));
        wait = FIRST_PAUSE_MS;
        yield job;
        if (hasEnded(job)) return;
      }
    } catch (error) {
      if (error instanceof ServerError && error.status === 404) throw error;
      if (error instanceof ServerError) trouble = error;
    } finally {
      clearTimeout(alarm);
      hangUp();
    }
    if (document.hidden) continue;
    yield trouble;
    await pause(wait);
  }
}

/** @returns {Promise<void>} resolves when the page is visible */
function visible() {
  return new Promise((resolve) => {
    const check = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", check);
      resolve();
    };
    document.addEventListener("visibilitychange", check);
    check();
  });
}

/**
 * Reads server-sent events. The browser's EventSource cannot send a key with its request:
 * https://html.spec.whatwg.org/multipage/server-sent-events.html
 * @param {ReadableStream<Uint8Array<ArrayBuffer>> | null} body
 * @param {() => void} heard called whenever data arrives
 * @returns {AsyncGenerator<Record<string, string>, void>} fields of each event
 */
async function* events(body, heard) {
  if (!body) return;
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    heard();
    const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
    text = blocks.pop() ?? "";
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => !line.startsWith(":"));
      if (lines.length) yield Object.fromEntries(lines.map((line) => line.split(/: ?(.*)/s)));
    }
  }
}
