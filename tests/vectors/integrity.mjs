// Computes the vectors of integrity.json anew, as a worker in JavaScript would, and says which ones it cannot.
// Usage: node integrity.mjs [integrity.json]. Prints one JSON object; exits with 1 if a vector comes out differently.
import { createHash, createHmac } from "node:crypto";
import { readFileSync } from "node:fs";

const file = process.argv[2] ?? new URL("./integrity.json", import.meta.url);
const vectors = JSON.parse(readFileSync(file, "utf8"));

// JSON.parse makes 1 of 1.0, and loses digits of integers from 2^53 on.
const LOST = new Set(["floats", "big integers"]);

// JavaScript compares texts by UTF-16 units; the canonical form sorts by code point, as UTF-8 bytes do.
const byCodePoint = (a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b));

function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value !== null && typeof value === "object") {
    const keys = Object.keys(value).sort(byCodePoint);
    return `{${keys.map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`).join(",")}}`;
  }
  if (typeof value === "number" && !Number.isSafeInteger(value)) throw new Error(`${value} has no canonical form here`);
  return JSON.stringify(value);
}

const sha256 = (text) => createHash("sha256").update(text, "utf8").digest("hex");
const sign = (text) => createHmac("sha256", vectors.key).update(text, "utf8").digest("hex");

const covered = [];
const notCovered = [];
const wrong = [];

function check(vector, value) {
  const lost = vector.needs.filter((need) => LOST.has(need));
  if (lost.length > 0) {
    notCovered.push({ name: vector.name, needs: lost });
    return;
  }
  const text = canonical(value);
  const found = { canonical: text, sha256: sha256(text), ...(vector.sig && { sig: sign(text) }) };
  const differs = Object.keys(found).filter((name) => found[name] !== vector[name]);
  if (differs.length > 0) wrong.push({ name: vector.name, differs, found });
  else covered.push(vector.name);
}

for (const one of vectors.results) {
  check(one, { job_id: one.job_id, ok: one.ok, result: JSON.parse(one.result), error: JSON.parse(one.error) });
}
for (const one of vectors.payloads) check(one, { kind: one.kind, params: JSON.parse(one.params) });

console.log(JSON.stringify({ covered, not_covered: notCovered, wrong }, null, 1));
process.exit(wrong.length > 0 ? 1 : 0);
