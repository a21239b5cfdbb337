"""A Chromium without a window, told what to do over a pipe: no driver, no port, no package."""

import json
import os
import shutil
import subprocess
import time

EXECUTABLE = next(
  filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
)
_FLAGS = [
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-dev-shm-usage',
  '--no-first-run',
]


class Page:
  """One page; the protocol is that of chromedevtools.github.io/devtools-protocol."""

  def __init__(self, url, profile):
    read, self._write = os.pipe()
    self._read, write = os.pipe()
    # It reads commands from file 3 and writes to 4.
    start = f'exec "$0" "$@" 3<&{read} 4>&{write}'
    flags = [*_FLAGS, f'--user-data-dir={profile}', '--remote-debugging-pipe']
    self._process = subprocess.Popen(
      ['bash', '-c', start, EXECUTABLE, *flags],
      pass_fds=(read, write),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    self._rest, self._number, self._session = b'', 0, {}
    target = self._call('Target.createTarget', url='about:blank')['targetId']
    session = self._call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    self._session = {'sessionId': session}
    self._call('Page.enable')
    self._call('Page.navigate', url=url)

  def _call(self, method, **params):
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params, **self._session}
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while True:
      while b'\0' not in self._rest:
        more = os.read(self._read, 1 << 16)
        assert more, 'the browser has ended'
        self._rest += more
      text, _, self._rest = self._rest.partition(b'\0')
      answer = json.loads(text)
      if answer.get('id') == self._number:  # else an event
        assert 'error' not in answer, answer
        return answer['result']

  def value(self, expression):
    """Returns what a line of JavaScript is."""
    found = self._call('Runtime.evaluate', expression=expression, returnByValue=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def wait_for(self, expression, seconds=120):
    """Waits until it is true, and returns it."""
    end = time.monotonic() + seconds
    while not (found := self.value(expression)):
      assert time.monotonic() < end, expression
      time.sleep(0.05)
    return found

  def type(self, text):
    self._call('Input.insertText', text=text)

  def press(self, key, code=0, modifiers=0, text=''):
    event = {'key': key, 'code': key, 'windowsVirtualKeyCode': code, 'modifiers': modifiers}
    for kind in ('keyDown', 'keyUp'):
      self._call('Input.dispatchKeyEvent', type=kind, **event, **({'text': text} if text else {}))

  def close(self):
    os.close(self._write)
    os.close(self._read)
    self._process.kill()
    self._process.wait()
