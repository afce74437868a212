// Program i: a sandbox whose time is over is paused, and woken by traffic, once for any number of requests. Who may not pass wakes nothing.
import { Sandbox } from '@e2b/code-interpreter'
import { answering, assert, patience, saw, until } from './check.mjs'
import { fetchOnce } from './machine.mjs'

const requests = 100
const lifecycle = { onTimeout: 'pause', autoResume: true }
const state = async (sandbox) => (await Sandbox.getInfo(sandbox.sandboxId)).state

/** How many sandboxes have been resumed on the node. */
async function resumed() {
  const metrics = await (await fetch(process.env.LAB_METRICS)).text()
  return Number(metrics.match(/^sluice_sandboxd_resumed_total (\d+)/m)?.[1] ?? 0)
}

// As python -m http.server, whose queue holds five connections.
const server = `
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(('', 3000), SimpleHTTPRequestHandler).serve_forever()
`

async function serving(options) {
  const sandbox = await Sandbox.create({ timeoutMs: 300_000 * patience, lifecycle, ...options })
  await sandbox.files.write('/tmp/server.py', server)
  await sandbox.commands.run('python /tmp/server.py', { background: true, timeoutMs: 0 })
  return sandbox
}

const sandbox = await serving({})
try {
  const url = 'https://' + sandbox.getHost(3000)
  assert.equal((await answering(url)).status, 200)
  await sandbox.setTimeout(1000)
  await until('it is paused when its time is over', async () => (await state(sandbox)) === 'paused', 20_000)

  const before = await resumed()
  const answers = await Promise.all(Array.from({ length: requests }, () => fetchOnce(url)))
  const bad = answers.filter((a) => a.status !== 200)
  assert.equal(bad.length, 0, JSON.stringify(bad[0]))
  assert.equal(await state(sandbox), 'running')
  assert.equal((await resumed()) - before, 1)
  saw('wake', `${requests} requests at once were all answered with 200, by one resume`)
  await sandbox.setTimeout(1000)
  await until('it is paused again', async () => (await state(sandbox)) === 'paused', 20_000)
} finally {
  await sandbox.kill()
}

const secret = await serving({ network: { allowPublicTraffic: false } })
try {
  const url = 'https://' + secret.getHost(3000)
  const right = { 'e2b-traffic-access-token': secret.trafficAccessToken }
  assert.equal((await answering(url, { headers: right })).status, 200)
  assert.equal(await secret.pause(), true)
  for (const headers of [{}, { 'e2b-traffic-access-token': 'f'.repeat(64) }]) {
    assert.equal((await fetchOnce(url, headers)).status, 403)
    assert.equal(await state(secret), 'paused')
  }
  assert.equal((await fetchOnce(url, right)).status, 200)
  assert.equal(await state(secret), 'running')
  saw('private', 'no token and a wrong one get 403 and wake nothing, the right one does')
} finally {
  await secret.kill()
}
