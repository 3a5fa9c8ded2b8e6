/** Requests as jobs of the server, which go on whatever becomes of this page and its connection. */

import { ServerError, ask } from "./api.js";
import { pause } from "./page.js";

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
 * @property {boolean} [cancelling]
 * @property {{message: string}} [error]
 * @property {{stage: "waiting" | "prior" | "decoder", done?: number, total?: number}[]} [images]
 * @property {{image: number, index: number, url: string}[]} [previews]
 * @property {{data: {url: string, seed: number, revised_prompt: string}[]}} [result]
 */

const PATH = "v1/images/jobs";
const PREVIEWS = 3;
const LONGEST_PAUSE_MS = 10_000;
/** The server says something every 15 seconds; a line that is silent for longer is dead, and nobody has told. */
const SILENCE_MS = 40_000;

/** @param {Job} job */
export function hasEnded(job) {
  return job.status !== "queued" && job.status !== "running";
}

/**
 * Where a file is on this server. Its URL may lead to an object store, or to an address that only others reach.
 * @param {string} url
 */
export function filePath(url) {
  return `files/${new URL(url).pathname.split("/").at(-1)}`;
}

/**
 * Submit a request; one that was submitted already is not made again.
 * @param {Entry} entry
 * @returns {Promise<Job>}
 */
export async function submit({ id, request, sources }) {
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
  return (await ask(PATH, { method: "POST", headers, body })).json();
}

/** @param {string} id @returns {Promise<Job>} */
export async function look(id) {
  return (await ask(`${PATH}/${id}`)).json();
}

/** @param {string} id @returns {Promise<Job>} */
export async function cancel(id) {
  return (await ask(`${PATH}/${id}`, { method: "DELETE" })).json();
}

/**
 * Have the server delete an ended job and its images.
 * @param {string} id
 */
export async function purge(id) {
  await ask(`${PATH}/${id}/purge`, { method: "POST" });
}

/**
 * A job whenever it has changed, until it has ended; null while the connection is lost.
 * @param {string} id
 * @returns {AsyncGenerator<Job | null, void>}
 * @throws {ServerError} there is no such job any more
 */
export async function* follow(id) {
  let seen = "";
  for (let wait = 500; ; wait = Math.min(wait * 2, LONGEST_PAUSE_MS)) {
    try {
      const headers = seen ? { "Last-Event-ID": seen } : undefined;
      const response = await withinTime(ask(`${PATH}/${id}/events`, { headers }));
      for await (const event of events(response)) {
        if (event.event === "error") break;
        const job = /** @type {Job} */ (JSON.parse(event.data ?? ""));
        seen = event.id ?? "";
        wait = 500;
        yield job;
        if (hasEnded(job)) return;
      }
    } catch (error) {
      const isRefused = error instanceof ServerError && error.status < 500;
      if (isRefused || !(error instanceof ServerError || error instanceof TypeError)) throw error;
    }
    yield null;
    await pause(wait);
  }
}

/**
 * @template T
 * @param {Promise<T>} reading
 * @returns {Promise<T>}
 * @throws {TypeError} it takes too long, as `fetch` has it
 */
function withinTime(reading) {
  return new Promise((resolve, reject) => {
    const alarm = setTimeout(() => reject(new TypeError("The line is silent.")), SILENCE_MS);
    reading.then(resolve, reject).finally(() => clearTimeout(alarm));
  });
}

/**
 * Server-sent events, which the browser's own EventSource cannot ask for with a key:
 * https://html.spec.whatwg.org/multipage/server-sent-events.html
 * @param {Response} response
 * @returns {AsyncGenerator<Record<string, string>, void>} the fields of each
 */
async function* events(response) {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await withinTime(reader.read());
      if (done) return;
      const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
      text = blocks.pop() ?? "";
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => !line.startsWith(":"));
        if (lines.length) yield Object.fromEntries(lines.map((line) => line.split(/: ?(.*)/s)));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // which hangs up
  }
}
