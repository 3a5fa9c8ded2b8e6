/** Code for a request: with curl, and with OpenAI's clients for Python and JavaScript. */

/** @typedef {Record<string, string | number | boolean>} Fields */

/** Named parameters of OpenAI's Python client. Other fields are passed in `extra_body`. */
const OPENAI = ["prompt", "model", "n", "size", "quality", "output_format", "moderation"];

/**
 * @param {"curl" | "python" | "javascript"} language
 * @param {Fields} request
 * @param {number} sources number of source images, from files named `source-1.png` and so on
 * @param {boolean} withKey whether the code sends a key from the variable `API_KEY`
 * @returns {string}
 */
export function snippet(language, request, sources, withKey) {
  const base = new URL("v1", document.baseURI).href;
  const files = Array.from({ length: sources }, (_, index) => `source-${index + 1}.png`);
  return { curl, python, javascript }[language](base, request, files, withKey);
}

/**
 * @param {string} base
 * @param {Fields} request
 * @param {string[]} files
 * @param {boolean} withKey
 */
function curl(base, request, files, withKey) {
  const key = withKey ? ['-H "Authorization: Bearer $API_KEY"'] : [];
  const body = files.length
    ? [
        ...Object.entries(request).map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`),
        ...files.map((file) => `-F 'image[]=@${file}'`),
      ]
    : ["-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(request))}`];
  return [`curl ${base}/images/${files.length ? "edits" : "generations"}`, ...key, ...body].join(" \\\n  ");
}

/** @param {string} text text to quote for a shell */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/**
 * @param {string} base
 * @param {Fields} request
 * @param {string[]} files
 * @param {boolean} withKey
 */
function python(base, request, files, withKey) {
  /** @param {string | number | boolean} value */
  const literal = (value) => (value === true ? "True" : value === false ? "False" : JSON.stringify(value));
  const named = Object.entries(request).filter(([name]) => OPENAI.includes(name));
  const others = Object.entries(request).filter(([name]) => !OPENAI.includes(name));
  const extra = others.map(([name, value]) => `${JSON.stringify(name)}: ${literal(value)}`).join(", ");
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${base}", api_key=${withKey ? 'os.environ["API_KEY"]' : '"none"'}, timeout=600)`,
    `result = client.images.${files.length ? "edit" : "generate"}(`,
    ...(files.length ? [`    image=[${files.map((file) => `open("${file}", "rb")`).join(", ")}],`] : []),
    ...named.map(([name, value]) => `    ${name}=${literal(value)},`),
    ...(extra ? [`    extra_body={${extra}},`] : []),
    ")",
    "for image in result.data:",
    "    print(image.url)",
  ].join("\n");
}

/**
 * @param {string} base
 * @param {Fields} request
 * @param {string[]} files
 * @param {boolean} withKey
 */
function javascript(base, request, files, withKey) {
  return [
    ...(files.length ? ['import { createReadStream } from "node:fs";', ""] : []),
    'import OpenAI from "openai";',
    "",
    `const client = new OpenAI({ baseURL: "${base}", apiKey: ${withKey ? "process.env.API_KEY" : '"none"'} });`,
    `const result = await client.images.${files.length ? "edit" : "generate"}({`,
    ...(files.length ? [`  image: [${files.map((file) => `createReadStream("${file}")`).join(", ")}],`] : []),
    ...Object.entries(request).map(([name, value]) => `  ${name}: ${JSON.stringify(value)},`),
    "});",
    "for (const image of result.data) console.log(image.url);",
  ].join("\n");
}
