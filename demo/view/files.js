// A score to take away: JSON, a table as CSV or for the clipboard.

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

// RFC 4180, with texts in quotes.
export function csvOf(rows) {
  const cell = (value) =>
    typeof value === "string" && value !== "Infinity" ? `"${value.replaceAll('"', '""')}"` : (value ?? "");
  return rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

// For a spreadsheet: with tabs between cells.
export function tsvOf(rows) {
  const cell = (value) => String(value ?? "").replace(/[\t\r\n]/g, " ");
  return rows.map((row) => row.map(cell).join("\t")).join("\n");
}

export function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
