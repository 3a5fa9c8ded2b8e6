/** The API reference: Swagger UI, which shows the OpenAPI document and sends requests. */

/** Code and URLs in a description. */
const INLINE = /`([^`]+)`|(https:\/\/[^\s<>()]*[^\s<>().,;:])/;

/**
 * Renders descriptions as paragraphs with code and links. Swagger UI's own Markdown writes HTML, which the content
 * security policy forbids.
 * @param {SwaggerSystem} system
 */
function plainMarkdown({React: {createElement}}) {
	/** @param {string} text */
	const inline = text =>
		text.split(INLINE).map((part, index) => {
			if (!part || index % 3 === 0) return part;
			if (index % 3 === 1) return createElement("code", {key: index}, part);
			return createElement("a", {key: index, href: part, target: "_blank", rel: "noreferrer"}, part);
		});
	/** @param {{source?: unknown, className?: string}} properties */
	const Markdown = ({source, className = ""}) => {
		if (typeof source !== "string") return null;
		const paragraphs = source.trim().split(/\n\s*\n/);
		return createElement(
			"div",
			{className: `markdown renderedMarkdown ${className}`},
			...paragraphs.map((text, key) => createElement("p", {key}, ...inline(text))),
		);
	};
	return {wrapComponents: {Markdown: () => Markdown}};
}

/** Sends requests to the address in the browser, since a proxy in front of the server may add a prefix. */
function ownAddress() {
	const servers = [{url: new URL(".", location.href).href.slice(0, -1)}];
	/** @param {(document: object) => object} update */
	const updateJsonSpec = update => /** @param {object} document */ document => update({...document, servers});
	return {statePlugins: {spec: {wrapActions: {updateJsonSpec}}}};
}

/** Opens the operation that the URL names. Swagger UI's own action logs an error if a name has an underscore. */
function deepLinks() {
	/** @type {(original: unknown, system: SwaggerSystem) => (hash: string) => void} */
	const parseDeepLinkHash =
		(_, {layoutActions, layoutSelectors}) =>
		hash => {
			const names = hash.replace(/^#?!?\/?/, "").split("/");
			if (!names[0]) return;
			const key = layoutSelectors.isShownKeyFromUrlHashArray(names);
			layoutActions.show(key, true);
			layoutActions.scrollTo(key);
		};
	return {statePlugins: {layout: {wrapActions: {parseDeepLinkHash}}}};
}

/**
 * Adds the missing second level of headings, takes links out of buttons, and adds the component for lists of files
 * whose absence Swagger UI logs.
 * @param {SwaggerSystem} system
 */
function mendedComponents({React: {createElement, Fragment}}) {
	/** @param {{text?: string}} properties */
	const Text = ({text}) => createElement("span", {}, text);
	/** @param {SwaggerComponent} operations */
	const withHeading = operations => /** @param {object} properties */ properties => {
		const heading = createElement("h2", {className: "unseen"}, "Operations");
		return createElement(Fragment, {}, heading, createElement(operations, properties));
	};
	/** @param {{getComponent: (name: string) => SwaggerComponent}} properties */
	const File = properties => createElement(properties.getComponent("JsonSchema_string"), properties);
	return {
		components: {JsonSchema_string_binary: File},
		wrapComponents: {DeepLink: () => Text, operations: withHeading},
	};
}

/** Attributes for screen readers and the keyboard that Swagger UI lacks, by selector. */
const ATTRIBUTES = {
	"#servers": {"aria-label": "Server"},
	".body-param__text": {"aria-label": "Request body"},
	".close-modal": {"aria-label": "Close"},
	".examples-select-element": {"aria-label": "Example"},
	".information-container": {role: "region", "aria-label": "About"},
	".microlight": {tabindex: "0"},
	".modal-ux": {role: "dialog", "aria-modal": "true", "aria-label": "Available authorizations"},
	".modal-ux [aria-label='Apply credentials']": {"aria-label": "Authorize"},
	".modal-ux h3": {"aria-level": "2"},
	".modal-ux h4": {"aria-level": "3"},
	".modal-ux h6": {"aria-level": "4"},
	".modal-ux [aria-label='Remove authorization']": {"aria-label": "Logout"},
	".response img": {alt: "Response"},
	".schemes-server-container": {role: "region", "aria-label": "Server and key"},
};

function addAttributes() {
	for (const [selector, attributes] of Object.entries(ATTRIBUTES)) {
		for (const element of document.querySelectorAll(selector)) {
			for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
		}
	}
	for (const row of document.querySelectorAll("tr[data-param-name], tr[data-property-name]")) {
		const name = row.getAttribute("data-param-name") ?? row.getAttribute("data-property-name") ?? "";
		for (const field of row.querySelectorAll("input, select, textarea")) field.setAttribute("aria-label", name);
	}
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", paint);
paint();

new MutationObserver(addAttributes).observe(document.body, {childList: true, subtree: true});

const ui = SwaggerUIBundle({
	domNode: document.querySelector("#reference"),
	url: "openapi.json",
	plugins: [plainMarkdown, ownAddress, deepLinks, mendedComponents],
	deepLinking: true,
	defaultModelsExpandDepth: 0,
	displayRequestDuration: true,
	syntaxHighlight: {theme: "tomorrow-night"},
	validatorUrl: null, // it would send the document to another server
	onComplete() {
		const key = sessionStorage.getItem("api-key"); // of the playground in this tab
		if (key) ui.preauthorizeApiKey("bearer", key);
	},
});
