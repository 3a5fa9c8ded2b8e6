/** The choice of a size: shapes with about as many pixels as the model's default, or two sides. */

import {copyOf, find} from "./page.js";

const RATIOS = ["1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16"];
/** Largest error of a shape's label. */
const TOLERANCE = 0.03;
const CUSTOM = "custom";

export class Shapes {
	#sides = [find("#width"), find("#height")];
	#list = find("#shape-list");
	/** @type {Model | undefined} */
	#model;

	constructor() {
		for (const side of this.#sides) side.addEventListener("change", () => this.#round(side));
		this.#list.addEventListener("change", () => this.#radio.value === CUSTOM && this.#round());
	}

	/** @returns {string} the size, or an empty string for the default */
	get value() {
		const {value} = this.#radio;
		return value === CUSTOM ? this.#sides.map(side => side.value).join("x") : value;
	}

	set value(size) {
		const radios = [...this.#list.querySelectorAll("input")];
		const offered = radios.find(({value}) => value === size);
		if (!offered) [this.#sides[0].value, this.#sides[1].value] = size.split("x");
		(offered ?? radios[radios.length - 1]).checked = true;
	}

	get #radio() {
		return find("input:checked", this.#list);
	}

	/**
	 * Offers the shapes of a model, and keeps the chosen size.
	 * @param {Model} model
	 */
	offer(model) {
		const before = this.#model ? this.value : "";
		this.#model = model;
		const shapes = RATIOS.flatMap(name => {
			const size = sizeOf(model, name);
			return size ? [radio(name, size.join("x"), size[0] / size[1])] : [];
		});
		this.#list.replaceChildren(radio("Auto"), ...shapes, radio("Custom", CUSTOM));
		find("input", this.#list).defaultChecked = true;
		this.value = before;
		if (this.#radio.value === CUSTOM) this.#round();
	}

	/**
	 * Shows the size in pixels, and the fields of a custom size.
	 * @param {boolean} isEditing whether the default is the size of the first source image
	 */
	show(isEditing) {
		const size = this.value || (isEditing ? "as the first image" : (this.#model?.defaults.size ?? ""));
		find("#pixels").textContent = size.replace("x", " × ");
		find("#sides").hidden = this.#radio.value !== CUSTOM;
	}

	/** Rounds the sides to the nearest ones that the model generates. If both are too many pixels, `kept` is kept. */
	#round(kept = this.#sides[0]) {
		const {sizes, limits, defaults} = /** @type {Model} */ (this.#model);
		const longest = (side = 1) => Math.floor(limits.pixels / side / sizes.multiple_of) * sizes.multiple_of;
		const max = Math.min(sizes.max, longest(sizes.min));
		const sides = this.#sides.map(({value}, index) => {
			return nearest(Number(value || defaults.size.split("x")[index]), {...sizes, max});
		});
		const other = kept === this.#sides[0] ? 1 : 0;
		sides[other] = Math.min(sides[other], longest(sides[1 - other]));
		for (const [index, side] of sides.entries()) this.#sides[index].value = String(side);
	}
}

function radio(name = "", value = "", ratio = 1) {
	const label = copyOf("shape");
	const [shape, text] = label.querySelectorAll("span");
	find("input", label).value = value;
	shape.style.setProperty("--ratio", String(ratio));
	text.textContent = name;
	return label;
}

/** @type {(side: number, sizes: Model["sizes"]) => number} */
function nearest(side, {min, max, multiple_of}) {
	return Math.min(max, Math.max(min, Math.round(side / multiple_of) * multiple_of));
}

/**
 * Returns the size of a shape whose number of pixels is nearest to the default's, if the model generates such a shape.
 * @param {Model} model
 */
function sizeOf({sizes, defaults, limits}, name = "") {
	const [across, down] = name.split(":").map(Number);
	const [wide, high] = defaults.size.split("x").map(Number);
	const found = [];
	for (let width = sizes.min; width <= sizes.max; width += sizes.multiple_of) {
		const height = nearest((width * down) / across, sizes);
		const error = Math.abs((width * down) / (height * across) - 1);
		if (error <= TOLERANCE && width * height <= limits.pixels) found.push([width, height]);
	}
	/** @param {number[]} size */
	const distance = ([width, height]) => Math.abs(Math.log((width * height) / (wide * high)));
	return found.sort((one, other) => distance(one) - distance(other))[0];
}
