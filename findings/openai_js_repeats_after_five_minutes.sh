#!/usr/bin/env bash
# OpenAI's JavaScript client sends a request again after 300 seconds of silence, although its timeout is 600.
#
# The client waits ten minutes for an answer, by its documentation and its code. But on Node it sends requests with
# Node's own fetch, which gives up after five minutes without the headers of an answer. The client takes that for a
# lost connection and repeats the request, twice by default. A server that makes an image for longer than five
# minutes, and answers at the end, makes it three times, and the caller gets an error. A larger `timeout` of the client
# changes nothing. A stream, whose headers come at once, is not affected. The Python client waits for its 600 seconds.
# Takes a little more than five minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-fund --no-audit openai@7.59.0
cat > silent.mjs <<'NODE'
import assert from "node:assert";
import {once} from "node:events";
import {readFile} from "node:fs/promises";
import {createServer} from "node:http";
import OpenAI from "openai";

const {version} = JSON.parse(await readFile("node_modules/openai/package.json", "utf8"));
console.log(`openai ${version}, node ${process.version}`);
const arrivals = [];
let done;
const second = new Promise(resolve => (done = resolve));
const server = createServer(request => {
	// It reads the request and is silent, as a server is that makes an image.
	arrivals.push({at: performance.now(), retry: request.headers["x-stainless-retry-count"]});
	request.resume();
	if (arrivals.length === 2) done();
}).listen(0, "127.0.0.1");
server.requestTimeout = 0;
await once(server, "listening");
const client = new OpenAI({baseURL: `http://127.0.0.1:${server.address().port}/v1`, apiKey: "none"});
console.log(`timeout of the client: ${client.timeout / 1000} s`);
client.images.generate({prompt: "a red boat", model: "m"}).catch(() => {});
await Promise.race([second, new Promise(resolve => setTimeout(resolve, 400_000))]);
assert.equal(client.timeout, 600_000, "the client's default timeout has changed");
assert.equal(arrivals.length, 2, "the request was not repeated: the behaviour has changed");
const seconds = (arrivals[1].at - arrivals[0].at) / 1000;
console.log(`the same request came again after ${seconds.toFixed(0)} s, as retry ${arrivals[1].retry}`);
assert(seconds > 290 && seconds < 320, "it was repeated at another time: the behaviour has changed");
process.exit();
NODE
node silent.mjs
