/** Requests to the server. */

import {askForKey, key} from "./key.js";

const TIMEOUT_MS = 30_000;

/** Error that the server, or a proxy before it, returned for a request. */
export class ServerError extends Error {
	/**
	 * @param {string} message
	 * @param {number} status
	 * @param {{code?: string, param?: string}} [own] the server's own error: its code, and the parameter at fault
	 */
	constructor(message, status, own) {
		super(message);
		this.status = status;
		this.own = own;
	}
}

/**
 * Returns whether the server says that something does not exist. A proxy's 404 says that the server is away.
 * @param {unknown} error
 */
export function isGone(error) {
	return error instanceof ServerError && error.status === 404 && error.own !== undefined;
}

/**
 * Sends a request, and asks the user for an API key if the server requires one.
 * @param {string} path
 * @param {RequestInit & {headers?: Record<string, string>, quietly?: boolean}} [options] `quietly`: do not ask
 *   the user for a key. Without a `signal`, the request times out after 30 seconds.
 * @returns {Promise<Response>} a response with a 2xx status; others are thrown
 */
export async function ask(path, {quietly = false, ...options} = {}) {
	for (;;) {
		const headers = {...options.headers, ...(key() && {Authorization: `Bearer ${key()}`})};
		const signal = options.signal ?? AbortSignal.timeout(TIMEOUT_MS);
		const response = await fetch(path, {...options, headers, signal}).catch(() => {
			throw new Error("The server cannot be reached. Check that it is running and that you are online.");
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
	const {status, statusText} = response;
	try {
		const {error} = await response.json();
		return new ServerError(error.message, status, error);
	} catch {
		// The body is no JSON: a proxy's error page, for example.
		return new ServerError(`The request failed: ${status} ${statusText}.`, status);
	}
}
