// Program g: two edges, two nodes, one Redis. The harness stops and starts Redis when this program asks it to.
import https from 'node:https'
import readline from 'node:readline'
import { Sandbox } from '@e2b/code-interpreter'
import { assert, patience, saw, until } from './check.mjs'

const edges = process.env.LAB_EDGES.split(',') // addresses; the names resolve to the first
const agent = new https.Agent({ keepAlive: true })
const input = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]()

/** Asks the harness to do something and waits until it is done. */
async function please(what) {
  console.log(`please: ${what}`)
  assert.equal((await input.next()).value, `done ${what}`)
}

/** One GET of a public name through one particular edge. */
function through(edge, host) {
  return new Promise((resolve, reject) => {
    const request = https.request({ host: edge, port: 443, servername: host, headers: { host }, agent, timeout: 5000 * patience }, (response) => {
      let text = ''
      response.on('data', (chunk) => { text += chunk })
      response.on('end', () => resolve({ status: response.statusCode, text, retryAfter: response.headers['retry-after'] }))
      response.on('error', reject)
    })
    request.on('timeout', () => request.destroy(new Error(`${edge}: no answer in ${5 * patience} s`)))
    request.on('error', reject)
    request.end()
  })
}

async function everywhere(sandboxes, want) {
  for (const sandbox of sandboxes) {
    for (const edge of edges) {
      const { status, text } = await through(edge, sandbox.getHost(3000))
      assert.equal(status, want, `${sandbox.sandboxId} through ${edge}: ${text}`)
    }
  }
}

const sandboxes = []
for (let i = 0; i < 4; i++) sandboxes.push(await Sandbox.create({ timeoutMs: 300_000 * patience }))
saw('created', sandboxes.map((s) => s.sandboxId).join(','))
await please('check placement')
try {
  for (const sandbox of sandboxes) {
    await sandbox.commands.run('python -m http.server 3000', { background: true, timeoutMs: 0 })
    await until('the server answers', async () => (await through(edges[0], sandbox.getHost(3000))).status === 200)
  }
  await everywhere(sandboxes, 200)
  saw('reach', 'each of four sandboxes on two nodes through each of two edges')

  const gone = sandboxes.pop()
  await gone.kill()
  const killed = Date.now()
  for (const edge of edges) {
    await until(`${edge} answers 502`, async () => (await through(edge, gone.getHost(3000))).status === 502, 1000)
  }
  const took = Date.now() - killed
  const { text } = await through(edges[1], gone.getHost(3000))
  assert.equal(JSON.parse(text).message, 'The sandbox was not found')
  assert.ok(took <= 100 * patience, `both edges answered 502 only after ${took} ms`)
  saw('kill', `both edges answered 502 within ${took} ms: ${text}`)

  await please('stop redis')
  await everywhere(sandboxes, 200)
  const unknown = gone.getHost(3000).replace(gone.sandboxId, 'i' + '0'.repeat(20))
  for (const edge of edges) {
    const answer = await until(`${edge} knows that it cannot know`, async () => {
      const a = await through(edge, unknown)
      return a.status === 502 ? null : a
    }, 15_000)
    assert.equal(answer.status, 503, answer.text)
    assert.ok(Number(answer.retryAfter) > 0, 'no Retry-After')
  }
  await everywhere(sandboxes, 200)
  saw('redis down', 'known sandboxes answer 200, unknown ones 503')

  await please('start redis')
  await until('unknown is 502 again', async () => (await through(edges[1], unknown)).status === 502, 30_000)
  await everywhere(sandboxes, 200)
  const fresh = await until('a sandbox can be created again', () => Sandbox.create().catch(() => null), 30_000)
  sandboxes.push(fresh)
  assert.equal((await fresh.commands.run('echo well')).stdout, 'well\n')
  saw('redis back', 'known, unknown and new sandboxes are as before')
} finally {
  for (const sandbox of sandboxes) await sandbox.kill()
}
process.exit(0)
