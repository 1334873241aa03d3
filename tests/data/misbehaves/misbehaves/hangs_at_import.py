import misbehaves

misbehaves.released.wait()
