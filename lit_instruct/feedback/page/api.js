// Talking to the server. The token travels in a header; it is kept for this tab alone, so that two labelers who share a
// browser are never mixed up, and taken out of the address, so that it is on no screenshot.

const TOKEN = /^#([A-Za-z0-9_-]{43})$/;

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
  }
}

export function takeToken() {
  const match = TOKEN.exec(location.hash);
  if (match) {
    sessionStorage.setItem("token", match[1]);
    history.replaceState(null, "", "/");
  }
  return sessionStorage.getItem("token");
}

// A second link opened in the same tab changes only what stands behind the #.
export function onNewToken(action) {
  addEventListener("hashchange", () => TOKEN.test(location.hash) && action());
}

// One event has one key, however often it must be sent.
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export async function call(name, body = {}, keepalive = false) {
  const response = await fetch(`/api/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${sessionStorage.getItem("token")}` },
    body: JSON.stringify(body),
    keepalive,
  });
  const answer = await response.json();
  if (!response.ok) throw new ApiError(response.status, answer.error);
  return answer;
}

// As call, again and again until the server answers: it may be starting anew, or its disk be full.
export async function callUntilHeard(name, body, onWaiting) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
    try {
      return await call(name, body);
    } catch (error) {
      if (error instanceof ApiError && error.status < 500) throw error;
      onWaiting();
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}
