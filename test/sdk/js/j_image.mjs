// Program j: a template from an OCI image with a start command answers at once, as the image's user, with what its layers left.
import { Sandbox } from '@e2b/code-interpreter'
import { assert, get, patience, saw } from './check.mjs'

const sandbox = await Sandbox.create('web', { timeoutMs: 300_000 * patience })
try {
  const answer = await get('https://' + sandbox.getHost(8000)) // no second try: it is ready when create returns
  assert.equal(answer.status, 200, answer.text)
  assert.deepEqual(JSON.parse(answer.text), {
    uid: 1234,
    dir: '/app',
    greeting: 'hello from the image',
    files: { hidden: false, 'dir/old': false, 'dir/new': true, link: true },
  })
  saw('answer', answer.text.trim())
  assert.equal((await sandbox.commands.run('echo $UID $PWD $GREETING')).stdout, '1234 /app hello from the image\n')
  saw('commands', "run as the image's user, in its directory, with its environment")
} finally {
  await sandbox.kill()
}
