/** Requests as jobs of the server, which go on whatever becomes of this page and its connection. */

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
 * @property {boolean} [cancelling]
 * @property {{message: string}} [error]
 * @property {{stage: "waiting" | "prior" | "decoder", done?: number, total?: number}[]} [images]
 * @property {{image: number, index: number, url: string}[]} [previews]
 * @property {{data: {url: string, seed: number, revised_prompt: string}[]}} [result]
 */

const PATH = "v1/images/jobs";
const PREVIEWS = 3;
const LONGEST_UPLOAD_MS = 600_000;
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
 * @param {{quietly: boolean}} how whether no key is asked for
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
  const signal = AbortSignal.timeout(LONGEST_UPLOAD_MS);
  return (await ask(PATH, { method: "POST", headers, body, signal, quietly })).json();
}

/** @param {string} id @returns {Promise<Job>} */
export async function look(id) {
  return (await ask(`${PATH}/${id}`, { quietly: true })).json();
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
 * A job whenever it has changed, until it has ended; in between, why it is not heard of. While nobody sees the page
 * it is let go, since a browser has six connections to a server for all its tabs.
 * @param {string} id
 * @returns {AsyncGenerator<Job | Error, void>}
 * @throws {ServerError} 404, there is no such job, or for another key only
 */
export async function* follow(id) {
  for (let wait = FIRST_PAUSE_MS; ; wait = longer(wait)) {
    await visible();
    const line = new AbortController();
    const { signal } = line;
    const hangUp = () => line.abort();
    let alarm = setTimeout(hangUp, SILENCE_MS);
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
      if (error instanceof ServerError) yield error;
    } finally {
      clearTimeout(alarm);
      hangUp();
    }
    if (document.hidden) continue;
    yield new Error("The connection is lost. The server goes on with it; connecting again…");
    await pause(wait);
  }
}

/** @returns {Promise<void>} when somebody sees the page */
function visible() {
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    look();
  });
}

/**
 * Server-sent events, which the browser's own EventSource cannot ask for with a key:
 * https://html.spec.whatwg.org/multipage/server-sent-events.html
 * @param {ReadableStream<Uint8Array<ArrayBuffer>> | null} body
 * @param {() => void} heard called whenever anything comes
 * @returns {AsyncGenerator<Record<string, string>, void>} the fields of each
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
