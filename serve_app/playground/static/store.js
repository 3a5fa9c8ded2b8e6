/** The requests of this browser, stored in IndexedDB because source images are files. */

const STORE = "entries";

/** @type {Promise<IDBDatabase | null> | undefined} null if the browser does not allow storage */
let opened;

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} what
 * @returns {Promise<T | undefined>}
 */
async function run(mode, what) {
	opened ??= new Promise(resolve => {
		const opening = indexedDB.open("playground", 1);
		opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, {keyPath: "id"});
		opening.onsuccess = () => resolve(opening.result);
		opening.onerror = () => resolve(null);
	});
	const transaction = (await opened)?.transaction(STORE, mode);
	if (!transaction) return undefined;
	const request = what(transaction.objectStore(STORE));
	return new Promise((resolve, reject) => {
		transaction.oncomplete = () => resolve(request.result);
		transaction.onabort = () => reject(transaction.error);
	});
}

/** @returns {Promise<Entry[]>} stored requests */
export async function entries() {
	return (await run("readonly", store => store.getAll())) ?? [];
}

/** @param {Entry} entry new request */
export async function keep(entry) {
	await run("readwrite", store => store.add(entry));
}

/**
 * Stores the state of a request, unless it was deleted meanwhile, for example in another tab.
 * @param {Entry} entry
 */
export async function update(entry) {
	await run("readwrite", store => {
		const looking = store.getKey(entry.id);
		looking.onsuccess = () => looking.result !== undefined && store.put(entry);
		return looking;
	});
}

export async function forget(id = "") {
	await run("readwrite", store => store.delete(id));
}
