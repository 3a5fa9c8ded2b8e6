/** Code for a request: with curl, and with OpenAI's clients for Python and JavaScript. */

/** Named parameters of OpenAI's Python client. Other fields are passed in `extra_body`. */
const OPENAI = ["prompt", "model", "n", "size", "quality", "output_format", "moderation"];

/** @typedef {(base: string, request: Fields, files: string[], withKey: boolean) => string[]} Write */
/** @type {Record<string, Write>} */
const LANGUAGES = {curl, python, javascript};

/**
 * Returns the code for a request.
 * @param {string} language
 * @param {Fields} request
 * @param {number} sources number of source images, from files named `source-1.png` and so on
 * @param {boolean} withKey whether the code sends a key from the variable `API_KEY`
 */
export function snippet(language, request, sources, withKey) {
	const files = Array.from({length: sources}, (_, index) => `source-${index + 1}.png`);
	return LANGUAGES[language](new URL("v1", document.baseURI).href, request, files, withKey).join("\n");
}

/** @type {Write} */
function curl(base, request, files, withKey) {
	const quoted = (text = "") => `'${text.replaceAll("'", "'\\''")}'`;
	const body = files.length
		? [
				...Object.entries(request).map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`),
				...files.map(file => `-F 'image[]=@${file}'`),
			]
		: ["-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(request))}`];
	const key = withKey ? ['-H "Authorization: Bearer $API_KEY"'] : [];
	return [[`curl ${base}/images/${files.length ? "edits" : "generations"}`, ...key, ...body].join(" \\\n  ")];
}

/** @type {Write} */
function python(base, request, files, withKey) {
	/** @param {unknown} value */
	const literal = value => (value === true ? "True" : JSON.stringify(value));
	const fields = Object.entries(request);
	const named = fields.filter(([name]) => OPENAI.includes(name)).map(([name, value]) => `${name}=${literal(value)}`);
	const others = fields
		.filter(([name]) => !OPENAI.includes(name))
		.map(([name, value]) => `"${name}": ${literal(value)}`);
	if (files.length) named.unshift(`image=[${files.map(file => `open("${file}", "rb")`).join(", ")}]`);
	if (others.length) named.push(`extra_body={${others.join(", ")}}`);
	return [
		...(withKey ? ["import os", ""] : []),
		"from openai import OpenAI",
		"",
		`client = OpenAI(base_url="${base}", api_key=${withKey ? 'os.environ["API_KEY"]' : '"none"'}, timeout=600)`,
		`result = client.images.${files.length ? "edit" : "generate"}(`,
		...named.map(argument => `    ${argument},`),
		")",
		"for image in result.data:",
		"    print(image.url)",
	];
}

/** @type {Write} */
function javascript(base, request, files, withKey) {
	const fields = Object.entries(request).map(([name, value]) => `${name}: ${JSON.stringify(value)}`);
	if (files.length) fields.unshift(`image: [${files.map(file => `createReadStream("${file}")`).join(", ")}]`);
	return [
		...(files.length ? ['import { createReadStream } from "node:fs";', ""] : []),
		'import OpenAI from "openai";',
		"",
		`const client = new OpenAI({ baseURL: "${base}", apiKey: ${withKey ? "process.env.API_KEY" : '"none"'} });`,
		`const result = await client.images.${files.length ? "edit" : "generate"}({`,
		...fields.map(field => `  ${field},`),
		"});",
		"for (const image of result.data) console.log(image.url);",
	];
}
