// Program h: a paused sandbox goes on where it was: processes, files, servers; the clock is right and old connections are reset.
import { Sandbox } from '@e2b/code-interpreter'
import { answering, assert, get, patience, saw, until } from './check.mjs'
import { counted, startCounter } from './machine.mjs'

const sandbox = await Sandbox.create({ timeoutMs: 300_000 * patience })
const id = sandbox.sandboxId
try {
  await sandbox.files.write('notes.txt', 'written before')
  const name = await startCounter(sandbox)
  await sandbox.commands.run('python -m http.server 3000', { background: true, timeoutMs: 0 })
  const url = 'https://' + sandbox.getHost(3000)
  assert.equal((await answering(url)).status, 200)
  // A connection to the internet that will not be there any more.
  const hold = `exec 3< /dev/tcp/8.8.8.8/${process.env.LAB_STREAM_PORT} && touch /tmp/open; cat <&3 >/dev/null 2>/tmp/why; echo $? >/tmp/ended`
  await sandbox.commands.run(hold, { background: true, timeoutMs: 0 })
  await until('the connection is open', () => sandbox.files.exists('/tmp/open'))
  const before = await counted(sandbox, name, 3)

  assert.equal(await sandbox.pause(), true)
  assert.equal((await Sandbox.getInfo(id)).state, 'paused')
  assert.equal(await sandbox.pause(), false)
  assert.equal((await get(url)).status, 502)
  saw('pause', `true, then false; it had counted to ${before}`)

  const again = await Sandbox.connect(id, { timeoutMs: 300_000 * patience })
  assert.equal((await Sandbox.getInfo(id)).state, 'running')
  const after = await counted(again, name, before)
  assert.equal(await again.files.read('notes.txt'), 'written before')
  assert.equal((await answering(url)).status, 200)
  const drift = Number((await again.commands.run('date +%s%3N')).stdout) - Date.now()
  assert.ok(Math.abs(drift) < 5000 * patience, `the clock is ${drift} ms off`)
  await until('the old connection is reset', () => again.files.exists('/tmp/ended'))
  assert.notEqual((await again.files.read('/tmp/ended')).trim(), '0')
  saw('connect', `the same process has counted on to ${after}, files, server and clock are right, the old connection is reset`)

  // Without memory it boots again: the disk is as it was, processes are gone.
  assert.equal(await again.pause({ keepMemory: false }), true)
  const booted = await Sandbox.connect(id, { timeoutMs: 300_000 * patience })
  assert.equal(await booted.files.read('notes.txt'), 'written before')
  assert.equal((await booted.commands.run("pgrep -f '[c]ounter.py' || echo none")).stdout, 'none\n')
  saw('without memory', 'files are there, processes are not')
} finally {
  assert.equal(await Sandbox.kill(id), true)
}
