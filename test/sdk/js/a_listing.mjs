// Program a: a server in the sandbox, reached by its public name; the closed-port answer once it is gone.
import { Sandbox } from '@e2b/code-interpreter'
import { answering, assert, get, saw, until } from './check.mjs'

const sandbox = await Sandbox.create()
try {
  const process = await sandbox.commands.run('python -m http.server 3000', { background: true })
  const url = 'https://' + sandbox.getHost(3000)
  const listing = await answering(url)
  assert.equal(listing.status, 200)
  assert.match(listing.text, /Directory listing for \//)
  saw('listing', listing.text.match(/<title>.*<\/title>/)[0])

  assert.equal(await process.kill(), true)
  const closed = await until('the port closes', async () => {
    const answer = await get(url)
    return answer.status === 502 ? answer : null
  })
  assert.deepEqual(JSON.parse(closed.text), {
    sandboxId: sandbox.sandboxId,
    message: 'The sandbox is running but port is not open',
    port: 3000,
    code: 502,
  })
  saw('after kill', closed.text)
} finally {
  await sandbox.kill()
}
