// A result to take away: JSON, a table as CSV or for the clipboard.

import { make } from "./make.js";

const COLUMNS = ["start", "end", "token", "bits", "rank", "entropy"];

// The rows of a score's tokens, the names of the columns first. null is an empty cell.
export function tableOf(score) {
  const most = Math.max(0, ...score.tokens.map(({ expected }) => expected.length));
  const numbers = Array.from({ length: most }, (_, i) => i + 1);
  const names = numbers.flatMap((n) => [`expected_${n}`, `expected_${n}_bits`]);
  const rows = score.tokens.map((token) => [
    ...COLUMNS.map((name) => token[name]),
    ...numbers.flatMap((n) => [token.expected[n - 1]?.token, token.expected[n - 1]?.bits]),
  ]);
  return [[...COLUMNS, ...names], ...rows];
}

const inQuotes = (text) => `"${text.replaceAll('"', '""')}"`;

// RFC 4180, with texts in quotes.
function csvOf(rows) {
  const isText = (value) =>
    typeof value === "string" && value !== "Infinity" && value !== "-Infinity";
  const cell = (value) => (isText(value) ? inQuotes(value) : (value ?? ""));
  return rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

// For a spreadsheet: with tabs between cells. A quote would begin a cell that ends with the next one.
function tsvOf(rows) {
  const cell = (value) => {
    const line = String(value ?? "").replace(/[\t\r\n]/g, " ");
    return line.startsWith('"') ? inQuotes(line) : line;
  };
  return rows.map((row) => row.map(cell).join("\t")).join("\n");
}

// The buttons. `result` gives the JSON, `tableOf` makes a table of it; the files have this name.
export function makeFiles(name, result, tableOf) {
  const told = make("output");
  const button = (label, onClick) => {
    const made = make("button", { type: "button" }, label);
    made.addEventListener("click", onClick);
    return made;
  };
  const buttons = [
    button("Save JSON", () => save(`${name}.json`, "application/json", JSON.stringify(result()))),
    button("Save CSV", () => save(`${name}.csv`, "text/csv", csvOf(tableOf(result())))),
  ];
  if (navigator.clipboard) {
    // not on a page without https
    buttons.unshift(
      button("Copy table", async () => {
        await navigator.clipboard.writeText(tsvOf(tableOf(result())));
        told.textContent = "Copied: paste it into a spreadsheet.";
        setTimeout(() => (told.textContent = ""), 5000);
      }),
    );
  }
  return make("p", { class: "files" }, ...buttons, told);
}

function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
