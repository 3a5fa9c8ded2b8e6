/** The form: shows the parameters of the chosen model, and builds requests from its fields. */

import {ServerError} from "./api.js";
import {find, messageOf, onClick} from "./page.js";
import {Shapes} from "./shapes.js";
import {Sources} from "./sources.js";

const STORED_AS = "form";

export class Form {
	#form = find("#request");
	#prompt = find("#prompt");
	#model = find("[name=model]");
	#problem = find("#problem");
	#shapes = new Shapes();
	#sources = new Sources();
	/** @type {Model[]} */
	#models = [];

	/** @param {(request: Fields, sources: File[]) => Promise<void>} generate */
	constructor(generate) {
		this.#form.addEventListener("submit", event => {
			event.preventDefault();
			this.#showProblem();
			/** @type {HTMLInputElement | null} */
			const wrong = this.#form.querySelector(":invalid:not(fieldset)");
			if (wrong)
				return this.#showProblem(`${wrong.labels?.[0].textContent?.trim()}: ${wrong.validationMessage}`, wrong);
			this.#save();
			this.#openOptions(false);
			generate(this.#request, this.#sources.files).catch(error => this.refuse(error));
		});
		this.#form.addEventListener("input", () => this.#adapt());
		this.#form.addEventListener("change", () => this.#adapt()); // a size is rounded then
		this.#model.addEventListener("change", () => this.#fit());
		this.#prompt.addEventListener("keydown", event => {
			if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
			event.preventDefault();
			this.#form.requestSubmit();
		});
		this.#sources.addEventListener("change", () => {
			if (this.#sources.files.length) this.#openOptions();
			this.#adapt();
		});
		this.#sources.addEventListener("refused", event => {
			this.#showProblem(/** @type {CustomEvent<string>} */ (event).detail);
		});
		onClick("#open-options", () => this.#openOptions(!this.#form.classList.contains("open")));
		onClick("#surprise", () => {
			const others = this.#chosen?.examples.filter(example => example !== this.#prompt.value) ?? [];
			this.#suggest(others[Math.floor(Math.random() * others.length)] ?? this.#prompt.value);
		});
	}

	/**
	 * Offers models for selection.
	 * @param {Model[]} models
	 */
	offer(models) {
		this.#models = models;
		this.#model.replaceChildren(...models.map(({id}) => new Option(id, id)));
		find("#model-field").hidden = models.length === 1;
		this.#fill(JSON.parse(sessionStorage.getItem(STORED_AS) ?? "{}"));
		find("#generate").removeAttribute("disabled");
	}

	/**
	 * Fills the form with a request, and clears the other fields.
	 * @param {Fields} request the chosen model if it names none
	 * @param {File[]} sources
	 */
	put(request, sources) {
		const model = this.#model.value;
		this.#form.reset();
		this.#fill({model, ...request});
		this.#sources.replace(sources);
		this.#save();
		this.#prompt.focus();
	}

	/** @param {File[]} sources source images to add */
	add(sources) {
		this.#sources.add(sources);
		this.#prompt.focus();
	}

	/**
	 * Shows an error, and marks the field that caused it.
	 * @param {unknown} error
	 */
	refuse(error) {
		const param = (error instanceof ServerError && error.own?.param) || "?";
		const field = param.startsWith("image") ? "#files" : `[name="${CSS.escape(param)}"]`;
		this.#showProblem(messageOf(error), this.#form.querySelector(field));
	}

	/**
	 * Shows a problem beside the button, and opens, marks and focuses the field at fault.
	 * @param {string} problem
	 * @param {HTMLElement | null} field
	 */
	#showProblem(problem = "", field = null) {
		if (this.#problem.textContent !== problem) this.#problem.textContent = problem; // so that screen readers read it once
		for (const marked of this.#form.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
		if (!field) return;
		if (find("#more").contains(field)) find("#more").setAttribute("open", "");
		if (field !== this.#prompt) this.#openOptions();
		field.ariaInvalid = "true";
		field.focus();
	}

	/** Shows or hides the options on a small screen, where they take the images' place. */
	#openOptions(isOpen = true) {
		this.#form.classList.toggle("open", isOpen);
		find("#open-options").ariaExpanded = String(isOpen);
	}

	/**
	 * Returns a hint on a prompt in which its model knows no word.
	 * @param {Fields} request
	 */
	hintOn({model, prompt}) {
		const {vocabulary} = this.#models.find(({id}) => id === model) ?? {};
		const isRead = String(prompt)
			.toLowerCase()
			.match(/\p{L}+/gu)
			?.some(word => vocabulary?.includes(word));
		return vocabulary && !isRead && "The model knows none of these words. Its description is under “More”.";
	}

	#suggest(prompt = "") {
		this.#prompt.value = prompt;
		this.#adapt();
		this.#prompt.focus();
	}

	/** @returns {Fields} fields that are filled in */
	get #request() {
		/** @type {Fields} */
		const request = {};
		for (const [name, value] of new FormData(this.#form)) {
			if (typeof value !== "string" || value.trim() === "") continue;
			const {type} = this.#field(name);
			request[name] = type === "number" ? Number(value) : type === "checkbox" || value;
		}
		if (request.size) request.size = this.#shapes.value;
		return request;
	}

	/** @param {Fields} fields */
	#fill(fields) {
		if (this.#models.some(({id}) => id === fields.model)) this.#model.value = String(fields.model);
		this.#fit();
		for (const [name, value] of Object.entries(fields)) {
			const field = this.#form.elements.namedItem(name);
			if (name === "size") this.#shapes.value = String(value);
			else if (field instanceof HTMLInputElement && field.type === "checkbox") field.checked = Boolean(value);
			else if (field instanceof HTMLInputElement || field instanceof HTMLTextAreaElement) field.value = String(value);
			else if (field instanceof HTMLSelectElement) {
				if ([...field.options].some(option => option.value === value)) field.value = String(value);
			}
		}
		this.#adapt();
	}

	#save() {
		sessionStorage.setItem(STORED_AS, JSON.stringify(this.#request));
	}

	get #chosen() {
		return this.#models.find(({id}) => id === this.#model.value);
	}

	#field(name = "") {
		return /** @type {HTMLInputElement} */ (find(`[name=${name}]`, this.#form));
	}

	/** Fits the fields to the chosen model. */
	#fit() {
		const model = this.#chosen;
		if (!model) return;
		const {limits, description, examples} = model;
		find("#description").textContent = description;
		find("#chosen").textContent = this.#models.length > 1 ? model.id : "";
		this.#prompt.maxLength = limits.prompt_chars;
		this.#prompt.placeholder = examples[examples.length - 1];
		for (const name of /** @type {const} */ (["n", "num_inference_steps", "guidance_scale"])) {
			this.#field(name).max = String(limits[name]);
		}
		for (const quality of find("[name=quality]").options) {
			quality.disabled = Number(quality.dataset.steps ?? 0) > limits.num_inference_steps;
		}
		this.#field("seed").max = String(Number.MAX_SAFE_INTEGER - limits.n); // each further image uses the next seed
		const buttons = examples.slice(0, 3).map(example => {
			const button = document.createElement("button");
			button.textContent = example;
			button.addEventListener("click", () => this.#suggest(example));
			return button;
		});
		find("#empty").replaceChildren(find("#empty p"), ...buttons);
		this.#shapes.offer(model);
		this.#sources.limit(model.editing ? model.max_source_images : 0);
	}

	/** Shows the fields that the model takes with the values of the others, and stores all. */
	#adapt() {
		const model = this.#chosen;
		if (!model) return;
		this.#showProblem();
		const {defaults, guidance_off, parameters} = model;
		const isEditing = this.#sources.files.length > 0;
		const guidance = isEditing ? defaults.edit_guidance_scale : defaults.guidance_scale;
		const isGuided = Number(this.#field("guidance_scale").value || guidance) > guidance_off;
		for (const control of find("#parameters").querySelectorAll("[name]")) {
			const field = /** @type {HTMLElement} */ (control.closest("label"));
			field.hidden =
				!parameters.includes(control.getAttribute("name") ?? "") ||
				(!isEditing && "editing" in field.dataset) ||
				(isEditing && "generating" in field.dataset) ||
				(!isGuided && "guided" in field.dataset);
			control.toggleAttribute("disabled", field.hidden);
		}
		this.#shapes.show(isEditing);
		const {steps} = find("[name=quality]").selectedOptions[0].dataset;
		this.#field("num_inference_steps").placeholder = steps ?? String(defaults.num_inference_steps);
		this.#field("guidance_scale").placeholder = String(guidance);
		this.#field("strength").placeholder = String(defaults.strength ?? "");
		find("#generate").textContent = isEditing ? "Edit" : "Generate";
		this.#save();
	}
}
