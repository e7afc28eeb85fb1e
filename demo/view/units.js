// The JSON of a score -> what is shown of it as one: tokens, words, sentences, or turns.
//
// A unit has its `text`; `first` and `stop`, [first, stop) of its tokens; `count`, how many of them
// are scored; and of the scored ones together `total`, the sum of their bits, and `bits`
// (surprisal), `entropy` and `rank`. In sentences and turns these are the mean of a token's bits
// and entropy and the median rank, in the smaller ones the sums and the highest rank; null where
// nothing is scored.

const sum = (values) => values.reduce((total, value) => total + value, 0);
const median = (values) => values.toSorted((a, b) => a - b)[Math.floor((values.length - 1) / 2)];

// The kinds that this score can be shown in.
export function kindsOf(score) {
  const hasPlaces = score.tokens.every((token) => token.start !== null);
  const kinds = ["token"];
  if (score.words) kinds.push("word");
  if (score.turns) kinds.push("turn");
  else if (hasPlaces && Intl.Segmenter) kinds.push("sentence");
  return kinds;
}

export const isMean = (kind) => kind === "sentence" || kind === "turn";

// The units of one kind, in order. Together they have all tokens and all of the text.
export function unitsOf(score, kind) {
  const characters = Array.from(score.text); // Python counts these, and JavaScript halves of some
  return rangesOf(score, kind, characters).map(([first, stop]) => {
    const tokens = score.tokens.slice(first, stop);
    return { text: textOf(tokens, characters), first, stop, ...figuresOf(tokens, isMean(kind)) };
  });
}

function rangesOf(score, kind, characters) {
  if (kind === "token") return score.pieces;
  if (kind === "word")
    return wholeRanges(
      score.words.map(({ first }) => first),
      score,
    );
  const isIn = kind === "turn" ? turnsOf(score) : sentencesOf(score, characters);
  const firsts = score.pieces
    .map(([first]) => first)
    .filter((first, i, all) => i === 0 || isIn(first) !== isIn(all[i - 1]));
  return wholeRanges(firsts, score);
}

// Where units begin -> their ranges, from the first token to the last.
function wholeRanges(firsts, score) {
  const starts = [0, ...firsts.slice(1)];
  return starts.map((first, i) => [first, starts[i + 1] ?? score.tokens.length]);
}

// A token -> the number of its sentence, by its first character that is no space.
function sentencesOf(score, characters) {
  const segmenter = new Intl.Segmenter(undefined, { granularity: "sentence" });
  const ends = [];
  let end = 0;
  for (const { segment } of segmenter.segment(score.text)) {
    end += Array.from(segment).length;
    if (!segment.trim() && ends.length) ends.pop(); // an empty line belongs to what is above it
    ends.push(end);
  }
  const numbers = [];
  let sentence = 0;
  for (const token of score.tokens) {
    let start = token.start;
    while (start < token.end - 1 && !characters[start].trim()) start += 1;
    while (sentence < ends.length - 1 && start >= ends[sentence]) sentence += 1;
    numbers.push(sentence);
  }
  return (i) => numbers[i];
}

// A token -> the number of the turn that it is in, or of what stands between two.
function turnsOf(score) {
  const borders = score.turns.flat();
  return (i) => borders.filter((border) => border <= i).length;
}

function textOf(tokens, characters) {
  const [first, last] = [tokens[0], tokens.at(-1)];
  if (first.start === null) return tokens.map(({ token }) => token).join("");
  return characters.slice(first.start, last.end).join("");
}

function figuresOf(tokens, isMeanOfTokens) {
  const scored = tokens.filter(({ bits }) => bits !== null);
  const count = scored.length;
  if (count === 0) return { count, total: 0, bits: null, entropy: null, rank: null };
  const by = isMeanOfTokens ? count : 1;
  const ranks = scored.map(({ rank }) => rank);
  const total = sum(scored.map(({ bits }) => Number(bits))); // JSON has "Infinity" as a text
  return {
    count,
    total,
    bits: total / by,
    entropy: sum(scored.map(({ entropy }) => Number(entropy))) / by,
    rank: isMeanOfTokens ? median(ranks) : Math.max(...ranks),
  };
}
