/** The playground: creates the parts of the page. */

import {ServerError, ask} from "./api.js";
import {Form} from "./form.js";
import {Gallery} from "./gallery.js";
import {askForKey, key} from "./key.js";
import {onClick, pause} from "./page.js";
import {Server} from "./server.js";

const RETRY_MS = 2000;

const server = new Server();
const form = new Form((request, sources) => gallery.make(request, sources));
const gallery = new Gallery(form, server);

onClick("#key-button", async () => {
	if (await askForKey("This page sends the key with every request.")) location.reload();
});

await gallery.open();
for (;;) {
	try {
		const {data} = await (await ask("v1/models")).json();
		form.offer(data);
		gallery.load();
		break;
	} catch (error) {
		form.refuse(error);
		const refused = error instanceof ServerError && error.status === 401 ? key() : null;
		do await pause(RETRY_MS);
		while (refused !== null && key() === refused); // the key may be entered for another request
	}
}
