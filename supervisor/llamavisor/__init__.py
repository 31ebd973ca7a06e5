"""Supervision of llama.cpp's llama-server routers: their processes, their models, and what happens to them.

`llamavisor.fleet` is the public face. A fleet needs a folder with models and one for its state, and nothing else:

    settings = FleetSettings(routers=(RouterSettings(models_dir=Path("/srv/models")),))
    async with Fleet.open(settings, state_dir=Path("/var/tmp/fleet")) as fleet:
        pull = await fleet.pull("ggml-org/Qwen3-8B-GGUF:Q4_K_M")  # begins to bring it from the Hugging Face Hub
        await pull.wait()  # its path, once it is there; `pull.files` tells how far it is
        await fleet.look(within_s=10)  # now; it is seen by itself a moment later
        for entry in fleet.storage.models():  # what there is, with files and headers
            print(entry.name, entry.state.value, entry.size_bytes)
        async with fleet.lease(pull.name) as endpoint:  # loaded if need be; stays until the block ends
            ...  # endpoint.url answers who sends endpoint.api_key
        await fleet.storage.remove(pull.name, unload=True)  # unloads it, then removes its files

When the block ends, all processes have. It runs on asyncio or trio, in the main thread: routers end with the thread
that has started them. `examples/chat.py` of the sources is a whole program. `settings` has the classes, whose
attributes are the keys of a configuration file; several routers, memory budgets and rules for single models are told
there. `fleet.bus` tells every event.

Nothing is imported here: the worker that reads a models folder needs a few modules of this package and must start in a
few milliseconds.
"""
