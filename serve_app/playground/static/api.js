/** Requests to the server, and the types of its answers. */

import { askForKey, key } from "./key.js";

/**
 * @typedef {object} Model
 * @property {string} id
 * @property {string | null} description
 * @property {string} family
 * @property {boolean} editing
 * @property {number} max_source_images
 * @property {{min: number, max: number, multiple_of: number}} sizes
 * @property {{size: string, num_inference_steps: number, guidance_scale: number, edit_guidance_scale: number,
 *   strength?: number}} defaults
 * @property {{n: number, num_inference_steps: number, guidance_scale: number, prompt_chars: number,
 *   pixels: number}} limits
 * @property {number} guidance_off
 * @property {string[]} parameters
 *
 * @typedef {object} Stage
 * @property {"unloaded" | "loading" | "ready" | "generating" | "unloading" | "failed"} state
 * @property {number} [replicas]
 * @property {number} [progress]
 * @property {string} [reason]
 *
 * @typedef {object} Health
 * @property {string} version
 * @property {Record<string, Record<string, Stage>>} models
 * @property {Stage} [safety_checker]
 * @property {Stage} [prompt_expander]
 *
 * @typedef {object} Status
 * @property {"idle" | "loading" | "generating"} status
 * @property {number} jobs_queued
 * @property {{stage: "waiting" | "prior" | "decoder"}[]} units
 */

const TIMEOUT_MS = 30_000;

/** Error of a request that got no answer. */
export class Unreachable extends Error {
  constructor() {
    super("The server cannot be reached. Check that it is running and that you are online.");
  }
}

/** Error that the server returned for a request. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status
   * @param {string} code
   * @param {string} [param] the parameter at fault
   */
  constructor(message, status, code, param) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

/**
 * Sends a request, and asks the user for an API key if the server requires one.
 * @param {string} path
 * @param {RequestInit & {headers?: Record<string, string>, quietly?: boolean}} [options] `quietly`: do not ask
 *   the user for a key. Without a `signal`, the request times out after 30 seconds.
 * @returns {Promise<Response>} a response with a 2xx status
 * @throws {ServerError} if the server answers with another status
 * @throws {Unreachable} if there is no answer
 */
export async function ask(path, { quietly = false, ...options } = {}) {
  for (;;) {
    const headers = { ...options.headers, ...(key() && { Authorization: `Bearer ${key()}` }) };
    const signal = options.signal ?? AbortSignal.timeout(TIMEOUT_MS);
    const response = await fetch(path, { ...options, headers, signal }).catch(() => {
      throw new Unreachable();
    });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || quietly || !(await askForKey(error.message))) throw error;
  }
}

/**
 * @param {Response} response
 * @returns {Promise<ServerError>}
 */
async function errorOf(response) {
  try {
    const { message, code, param } = (await response.json()).error;
    return new ServerError(message, response.status, code, param);
  } catch {
    // The body is no JSON: a proxy's error page, for example.
    return new ServerError(`The request failed: ${response.status} ${response.statusText}.`, response.status, "");
  }
}
