"""One hook at a time goes wrong, for the tenant "victim" where a request is known, and else always."""

import misbehaves
from llm_os import DeviceInfo, Fair, Tool, hookimpl
from misbehaves import misbehave


class Misbehaves:
    """Implements the one hook that `misbehaves.where` needs, as instances may."""

    def __init__(self):
        hook = HOOKS[misbehaves.where.partition(".")[0]]
        setattr(self, hook.__name__, hookimpl(hook))


class Policy(Fair):
    def share(self, share):
        return misbehave() if misbehaves.where == "Policy.share" else super().share(share)

    def rank(self, candidate):
        return misbehave() if misbehaves.where == "Policy.rank" else super().rank(candidate)


class Filter:
    def open(self, request):
        if request.tenant != "victim":
            return None
        return misbehave() if misbehaves.where == "Filter.open" else (request, TextFilter())


class TextFilter:
    def push(self, text):
        return misbehave() if misbehaves.where == "TextFilter.push" else text

    def flush(self):
        return misbehave() if misbehaves.where == "TextFilter.flush" else ""


class Pass:
    def apply(self, image):
        return misbehave()


def register_drivers(register):
    if misbehaves.where == "register_drivers":
        return misbehave()
    register("misbehaves", lambda config: misbehave(), probe)


def probe():
    if misbehaves.where == "Driver.probe":
        return misbehave()
    return DeviceInfo(driver="misbehaves", device="nothing", total_bytes=0, free_bytes=0)


def register_policies(register):
    if misbehaves.where == "register_policies":
        return misbehave()
    register("misbehaves", lambda config: misbehave() if misbehaves.where == "Policy.make" else Policy())


def register_filters(register):
    if misbehaves.where == "register_filters":
        return misbehave()
    register("misbehaves", Filter())


def register_passes(register):
    if misbehaves.where == "register_passes":
        return misbehave()
    register("misbehaves", Pass())


def register_tools(register):
    if misbehaves.where == "Tool.wrong":
        register(misbehave())
    if misbehaves.where == "register_tools":
        return misbehave()
    register(Tool(name="misbehave", description="x", parameters={"type": "object"}, call=lambda arguments: misbehave()))


def register_commands(register):
    return misbehave()


def open_image(model):
    return misbehave() if model.startswith("sim:victim") else None


def open_log(folder):
    return misbehave()


def open_swap(config):
    return misbehave()


def compile_grammar(grammar, image):
    return misbehave()


def admit(request):
    return misbehave() if request.tenant == "victim" else None


def pick_victim(victims):
    return misbehave()


def booted(config, device):
    return misbehave()


def step_finished(step):
    return misbehave()


def process_exited(process):
    return misbehave()


def halting():
    return misbehave()


HOOKS = {
    "Policy": register_policies,
    "Filter": register_filters,
    "TextFilter": register_filters,
    "Pass": register_passes,
    "Driver": register_drivers,
    "Tool": register_tools,
} | {name: value for name, value in list(globals().items()) if callable(value) and name.islower()}
