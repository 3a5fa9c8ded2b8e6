/** The requests of this browser, stored in IndexedDB because source images are files. */

/**
 * @typedef {object} Made a generated image
 * @property {string} path path of the file
 * @property {number} seed
 * @property {string} prompt prompt after expansion
 *
 * @typedef {object} Entry a request
 * @property {string} id idempotency key, so that a retry does not create a second job
 * @property {number} created milliseconds since 1970
 * @property {Record<string, string | number | boolean>} request fields of the request, without source images
 * @property {File[]} sources
 * @property {string} [job] id of the job, once the server has accepted the request
 * @property {Made[]} [images] images of a request that succeeded
 * @property {string} [size] size of the images
 * @property {number} [seconds] duration of the job
 * @property {string} [problem] error message of a request that failed
 */

const STORE = "entries";

/** @type {Promise<IDBDatabase | null> | undefined} */
let opened;

/** @returns {Promise<IDBDatabase | null>} null if the browser does not allow storage */
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

/** @returns {Promise<Entry[]>} stored requests, oldest first */
export async function entries() {
  const all = /** @type {Entry[] | undefined} */ (await run("readonly", (store) => store.getAll()));
  return (all ?? []).sort((one, other) => one.created - other.created);
}

/** @param {Entry} entry new request */
export async function keep(entry) {
  await run("readwrite", (store) => store.add(entry));
}

/**
 * Stores the state of a request, unless it was deleted meanwhile, for example in another tab.
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
