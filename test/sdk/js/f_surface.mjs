// Program f: the surface of files, commands, pty and lifecycle that programs use.
import { CommandExitError, FileNotFoundError, FilesystemEventType, Sandbox, TimeoutError } from '@e2b/code-interpreter'
import { assert, get, patience, saw, until } from './check.mjs'

const sandbox = await Sandbox.create({ metadata: { test: 'f surface', 'a b': 'c&d=e' }, envs: { FROM_CREATE: 'yes' }, timeoutMs: 120_000 * patience })
try {
  // files
  const info = await sandbox.files.write('hello.txt', 'hello, wörld')
  assert.equal(info.path, '/home/user/hello.txt')
  assert.equal(await sandbox.files.read('hello.txt'), 'hello, wörld')
  const bytes = new Uint8Array(3 << 20).map((_, i) => i * 31)
  await sandbox.files.write('deep/er/data.bin', bytes.buffer)
  assert.deepEqual(await sandbox.files.read('deep/er/data.bin', { format: 'bytes' }), bytes)
  await sandbox.files.write([{ path: 'many/1', data: 'one' }, { path: 'many/2', data: 'two' }])
  assert.deepEqual((await sandbox.files.list('many')).map((e) => [e.name, e.type]).sort(), [['1', 'file'], ['2', 'file']])
  await sandbox.files.write('empty', '')
  assert.equal(await sandbox.files.read('empty'), '')
  assert.equal(await sandbox.files.makeDir('made'), true)
  assert.equal(await sandbox.files.makeDir('made'), false)
  await sandbox.files.rename('hello.txt', 'made/renamed.txt')
  assert.equal(await sandbox.files.exists('hello.txt'), false)
  const entry = await sandbox.files.getInfo('made/renamed.txt')
  assert.deepEqual([entry.size, entry.owner, entry.permissions], [13, 'user', '-rw-r--r--'])
  await sandbox.files.remove('made')
  await assert.rejects(sandbox.files.read('made/renamed.txt'), FileNotFoundError)
  const events = []
  const watch = await sandbox.files.watchDir('many', (e) => { events.push(e) }, { recursive: true })
  await sandbox.files.write('many/3', 'three')
  await sandbox.files.makeDir('many/sub')
  await until('the new directory is watched', async () => {
    await sandbox.files.write('many/sub/4', 'four')
    return events.some((e) => e.name === 'sub/4' && e.type === FilesystemEventType.WRITE)
  })
  assert.ok(events.some((e) => e.name === '3' && e.type === FilesystemEventType.CREATE), JSON.stringify(events))
  await watch.stop()
  const signed = await sandbox.downloadUrl('many/1', { useSignatureExpiration: 60 })
  assert.equal((await get(signed)).text, 'one')
  assert.equal((await get(signed.replace('v1_', 'v1_x'))).status, 401)
  saw('files', 'write read list watch rename remove exists info signed')

  // commands
  const out = []
  const result = await sandbox.commands.run('echo "$FROM_CREATE $FROM_RUN $(pwd) $(whoami)"; echo err >&2', {
    envs: { FROM_RUN: 'too' }, cwd: '/tmp', onStdout: (s) => { out.push(s) },
  })
  assert.equal(result.stdout, 'yes too /tmp user\n')
  assert.equal(result.stderr, 'err\n')
  assert.equal(out.join(''), result.stdout)
  assert.equal((await sandbox.commands.run('id -u', { user: 'root' })).stdout, '0\n')
  const failed = await sandbox.commands.run('exit 3').catch((e) => e)
  assert.ok(failed instanceof CommandExitError && failed.exitCode === 3, String(failed))
  await assert.rejects(sandbox.commands.run('sleep 30', { timeoutMs: 500 }), TimeoutError)
  await until('the timed-out process is gone', async () => (await sandbox.commands.run('pgrep -x sleep || true')).stdout === '')
  const cat = await sandbox.commands.run('cat', { background: true, stdin: true })
  await cat.sendStdin('through stdin\n')
  await cat.closeStdin()
  assert.equal((await cat.wait()).stdout, 'through stdin\n')
  const sleeper = await sandbox.commands.run('sleep 60', { background: true })
  assert.ok((await sandbox.commands.list()).some((p) => p.pid === sleeper.pid))
  const joined = await sandbox.commands.connect(sleeper.pid)
  assert.equal(await sandbox.commands.kill(sleeper.pid), true)
  await assert.rejects(joined.wait(), CommandExitError)
  assert.equal(await sandbox.commands.kill(999999), false)
  const large = await sandbox.commands.run('head -c 5000000 /dev/zero | tr "\\0" x')
  assert.equal(large.stdout.length, 5_000_000)
  saw('commands', 'stdout stderr stdin env cwd user exit timeout kill list connect')

  // pty
  let screen = ''
  const pty = await sandbox.pty.create({ cols: 80, rows: 24, onData: (d) => { screen += new TextDecoder().decode(d) } })
  await sandbox.pty.resize(pty.pid, { cols: 100, rows: 30 })
  await sandbox.pty.sendInput(pty.pid, new TextEncoder().encode('stty size; tty; exit\n'))
  assert.equal((await pty.wait()).exitCode, 0)
  assert.match(screen, /30 100/)
  assert.match(screen, /\/dev\/pts\//)
  saw('pty', 'input, size and exit')

  // lifecycle
  const detail = await sandbox.getInfo()
  assert.deepEqual(detail.metadata, { test: 'f surface', 'a b': 'c&d=e' })
  assert.equal(await sandbox.isRunning(), true)
  await sandbox.setTimeout(300_000 * patience)
  assert.ok((await sandbox.getInfo()).endAt.getTime() - Date.now() > 250_000)
  const page = await Sandbox.list({ query: { metadata: { 'a b': 'c&d=e' } } }).nextItems()
  assert.deepEqual(page.map((s) => s.sandboxId), [sandbox.sandboxId])
  const same = await Sandbox.connect(sandbox.sandboxId)
  assert.equal(await same.files.read('many/1'), 'one')
  await until('metrics are there', async () => (await sandbox.getMetrics()).length > 0, 20_000)
  saw('lifecycle', 'getInfo isRunning setTimeout list connect metrics')
} finally {
  assert.equal(await sandbox.kill(), true)
}
assert.equal(await sandbox.isRunning(), false)
assert.equal(await sandbox.kill(), false)
await assert.rejects(sandbox.commands.run('true'), /not running|not found/i)

const brief = await Sandbox.create({ timeoutMs: 2_000 })
await until('the deadline ends the sandbox', async () => !(await brief.isRunning()), 10_000)
saw('end', 'kill() true then false, and a deadline kept')
