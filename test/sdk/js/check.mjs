// What the programs share: a place to say what was seen, and a wait that has an end.
import assert from 'node:assert/strict'

export { assert }

/** How much longer everything may take here than usual: where the processor is emulated, the harness says so. */
export const patience = Number(process.env.LAB_PATIENCE ?? 1)

/** Prints one line of evidence. The Go test keeps all of them, so a failure shows how far the program came. */
export function saw(what, value) {
  console.log(`${what}: ${typeof value === 'string' ? value : JSON.stringify(value)}`)
}

/** Calls probe until it returns something truthy, for at most ms milliseconds, with patience. */
export async function until(what, probe, ms = 10_000) {
  const end = Date.now() + ms * patience
  for (;;) {
    const value = await probe()
    if (value) return value
    if (Date.now() > end) assert.fail(`${what}: not within ${ms * patience} ms`)
    await new Promise((resolve) => setTimeout(resolve, 25))
  }
}

/** Fetches and reads the whole answer. */
export async function get(url, init) {
  const response = await fetch(url, init)
  return { status: response.status, type: response.headers.get('content-type') ?? '', text: await response.text() }
}

/** Waits until a server in the sandbox answers through the edge with something else than 502. */
export async function answering(url, init) {
  return until(`${url} answers`, async () => {
    const answer = await get(url, init)
    return answer.status === 502 ? null : answer
  })
}
