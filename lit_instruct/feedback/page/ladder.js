// The order of responses: levels from best to worst, each a group of tied responses, and those not placed yet.
// Pure functions: a ladder is {levels: [[response, ...], ...], tray: [response, ...]} and is never changed.

export function fromRanks(ranks) {
  const levels = [];
  const tray = [];
  ranks.forEach((rank, response) => {
    if (rank === null) tray.push(response);
    else (levels[rank - 1] ??= []).push(response);
  });
  return tidy(levels, tray);
}

export function toRanks(ladder, count) {
  const ranks = new Array(count).fill(null);
  ladder.levels.forEach((group, level) => group.forEach((response) => (ranks[response] = level + 1)));
  return ranks;
}

export function byRating(ratings) {
  const distinct = [...new Set(ratings)].sort((a, b) => b - a);
  return fromRanks(ratings.map((rating) => distinct.indexOf(rating) + 1));
}

// Where a response stands: its level, or -1.
export const levelOf = (ladder, response) => ladder.levels.findIndex((group) => group.includes(response));

// Put a response somewhere: {into: level} ties it with those there, {before: level} makes a level of its own above it
// (before: levels.length is below all), {} takes it out. Levels are counted as they are before the move.
export function place(ladder, response, { into, before }) {
  const without = ladder.levels.map((group) => group.filter((other) => other !== response));
  const tray = ladder.tray.filter((other) => other !== response);
  if (into !== undefined) without[into] = [...without[into], response];
  else if (before !== undefined) without.splice(before, 0, [response]);
  else tray.push(response);
  return tidy(without, tray);
}

// Half a step: out of a tie to a level of its own, or from there into the tie above (by -1) or below (by +1).
export function step(ladder, response, by) {
  const level = levelOf(ladder, response);
  if (level < 0) return by < 0 ? place(ladder, response, { before: ladder.levels.length }) : ladder;
  if (ladder.levels[level].length > 1) return place(ladder, response, { before: by < 0 ? level : level + 1 });
  const into = level + by;
  return into >= 0 && into < ladder.levels.length ? place(ladder, response, { into }) : ladder;
}

function tidy(levels, tray) {
  const full = levels.filter((group) => group?.length);
  return { levels: full.map((group) => [...group].sort((a, b) => a - b)), tray: [...tray].sort((a, b) => a - b) };
}
