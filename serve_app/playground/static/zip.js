/** Zip archives of files as they are: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT */

const TABLE = Uint32Array.from({length: 256}, (_, value) => {
	for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
	return value;
});

/** @param {Uint8Array} bytes */
function crc32(bytes) {
	let crc = -1;
	for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
	return ~crc >>> 0;
}

/**
 * Returns values in little-endian order.
 * @param {number[]} fields each value after its size in bytes
 */
function record(...fields) {
	/** @type {(value: number, size: number) => number[]} */
	const bytes = (value, size) => Array.from({length: size}, (_, at) => value >>> (8 * at));
	return Uint8Array.from(fields.flatMap((value, at) => (at % 2 ? bytes(value, fields[at - 1]) : [])));
}

/**
 * @param {File[]} files
 * @returns {Promise<Blob>} archive without compression: images are compressed already
 */
export async function zip(files) {
	const [parts, directory] = [[], []].map(() => /** @type {BlobPart[]} */ ([]));
	for (const [index, file] of files.entries()) {
		const bytes = new Uint8Array(await file.arrayBuffer());
		const name = new TextEncoder().encode(`${index + 1}-${file.name}`);
		const start = new Blob(parts).size;
		// Version 2.0, names in UTF-8, stored, 1 January 1980.
		const [crc, size] = [crc32(bytes), bytes.length];
		const common = [2, 20, 2, 2048, 2, 0, 2, 0, 2, 33, 4, crc, 4, size, 4, size, 2, name.length, 2, 0];
		parts.push(record(4, 0x04034b50, ...common), name, bytes);
		directory.push(record(4, 0x02014b50, 2, 20, ...common, 2, 0, 2, 0, 2, 0, 4, 0, 4, start), name);
	}
	const [count, start, size] = [files.length, new Blob(parts).size, new Blob(directory).size];
	const end = record(4, 0x06054b50, 2, 0, 2, 0, 2, count, 2, count, 4, size, 4, start, 2, 0);
	return new Blob([...parts, ...directory, end], {type: "application/zip"});
}
