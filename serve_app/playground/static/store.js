/** What this browser keeps of each request, across reloads: in IndexedDB, since source images are files. */

/**
 * @typedef {object} Made an image that was made
 * @property {string} path of its file
 * @property {number} seed
 * @property {string} prompt that was painted
 *
 * @typedef {object} Entry a request
 * @property {string} id by which the server knows that it is the same request if it is sent again
 * @property {number} created milliseconds since 1970
 * @property {Record<string, string | number | boolean>} request what was asked for, without the source images
 * @property {File[]} sources
 * @property {string} [job] the server's id, once it has taken the request
 * @property {Made[]} [images] once it has succeeded
 * @property {string} [size] of these
 * @property {number} [seconds] that it took
 * @property {string} [problem] why there are no images
 */

const STORE = "entries";

/** @type {Promise<IDBDatabase | null> | undefined} */
let opened;

/** @returns {Promise<IDBDatabase | null>} null where the browser keeps nothing, or is not allowed to */
function database() {
  opened ??= new Promise((resolve) => {
    const opening = indexedDB.open("playground", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => resolve(null);
  });
  return opened;
}

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} what
 * @returns {Promise<T | undefined>}
 */
async function run(mode, what) {
  const transaction = (await database())?.transaction(STORE, mode);
  if (!transaction) return undefined;
  const request = what(transaction.objectStore(STORE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** @returns {Promise<Entry[]>} the oldest first */
export async function entries() {
  const all = /** @type {Entry[] | undefined} */ (await run("readonly", (store) => store.getAll()));
  return (all ?? []).sort((one, other) => one.created - other.created);
}

/** @param {Entry} entry a new one */
export async function keep(entry) {
  await run("readwrite", (store) => store.add(entry));
}

/**
 * Note how it is now; of one that was forgotten meanwhile, in another tab say, nothing is kept.
 * @param {Entry} entry
 */
export async function update(entry) {
  await run("readwrite", (store) => {
    const looking = store.getKey(entry.id);
    looking.onsuccess = () => looking.result !== undefined && store.put(entry);
    return looking;
  });
}

/** @param {string} id */
export async function forget(id) {
  await run("readwrite", (store) => store.delete(id));
}
