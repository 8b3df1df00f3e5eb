// A client of deepstream that reads or writes one record.
//
//   node client.js NAME           prints it
//   node client.js NAME JSON      sets it first
import { DeepstreamClient } from '@deepstream/client'

const [name, json] = process.argv.slice(2)
const client = new DeepstreamClient(`ws://127.0.0.1:${process.env.DEEPSTREAM_PORT}/deepstream`)
await client.login({})

const record = client.record.getRecord(name)
await record.whenReady()
if (json) await record.setWithAck(JSON.parse(json))
console.log(name, record.version, JSON.stringify(record.get()))
client.close()
