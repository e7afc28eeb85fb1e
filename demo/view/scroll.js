// Two boxes with the same text, of which each scrolls the other to the same place.

// `pairs()` gives [element in one, element in the other], in the order of both.
export function scrollTogether(one, other, pairs) {
  const settled = new Map(); // where a box was scrolled to by this code

  function follow(leader, follower, ends) {
    const room = leader.scrollHeight - leader.clientHeight;
    if (room <= 0) return;
    // A line that moves from the top of the box to its bottom, so that both ends meet.
    const line = (leader.scrollTop / room) * leader.scrollHeight;
    const place = placeOf(line, leader, follower, ends);
    const others = follower.scrollHeight - follower.clientHeight;
    keep(follower, () => (follower.scrollTop = (place / follower.scrollHeight) * others));
  }

  // Scroll a box without moving the other one.
  function keep(box, scroll) {
    scroll();
    settled.set(box, box.scrollTop);
  }

  for (const [leader, follower, order] of [
    [one, other, 0],
    [other, one, 1],
  ]) {
    leader.addEventListener("scroll", () => {
      if (leader.scrollTop === settled.get(leader)) return; // it followed
      settled.delete(leader);
      follow(leader, follower, (pair) => [pair[order], pair[1 - order]]);
    });
  }

  // A height in the leader -> that in the follower, between the pairs around it.
  function placeOf(line, leader, follower, ends) {
    const all = pairs();
    const heights = (i) => {
      if (i < 0) return [0, 0];
      if (i >= all.length) return [leader.scrollHeight, follower.scrollHeight];
      const [own, others] = ends(all[i]);
      return [heightOf(own, leader), heightOf(others, follower)];
    };
    let [low, high] = [-1, all.length];
    while (high - low > 1) {
      const middle = Math.floor((low + high) / 2);
      if (heights(middle)[0] <= line) low = middle;
      else high = middle;
    }
    const [from, to] = [heights(low), heights(high)];
    const share = to[0] > from[0] ? (line - from[0]) / (to[0] - from[0]) : 0;
    return from[1] + share * (to[1] - from[1]);
  }

  return { keep };
}

// The middle of an element in a box, from the top of all that the box holds.
function heightOf(element, box) {
  const place = element.getBoundingClientRect();
  return (place.top + place.bottom) / 2 - box.getBoundingClientRect().top + box.scrollTop;
}
