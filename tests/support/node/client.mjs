// One official OFREP client, told what to do by lines on its standard input, telling what it sees by lines of JSON.
//
//   node client.mjs server|once|poll|stream BASE_URL KEY [TENANT]
//
// `ask` prints what an evaluation gives; the end of the input ends it. A web provider also prints every change it emits.
import { createInterface } from 'node:readline';

const FLAG = 'external_oms_enabled';
const [mode, baseUrl, key, tenant] = process.argv.slice(2);
const context = tenant ? { tenant } : {};
const statuses = [];

const say = (what) => console.log(JSON.stringify({ ...what, at: (performance.timeOrigin + performance.now()) / 1000 }));

async function watched(request) {
  const answer = await fetch(request);
  statuses.push(answer.status);
  return answer;
}

const options = { baseUrl, headers: [['X-API-Key', key]], fetchImplementation: watched };

async function serverSide() {
  const { OpenFeature } = await import('@openfeature/server-sdk');
  const { OFREPProvider } = await import('@openfeature/ofrep-provider');
  await OpenFeature.setProviderAndWait(new OFREPProvider(options));
  const client = OpenFeature.getClient();
  return () => client.getBooleanDetails(FLAG, false, context);
}

async function webSide() {
  if (mode === 'stream' && typeof EventSource === 'undefined') {
    globalThis.EventSource = (await import('eventsource')).EventSource;
  }
  const { OpenFeature, ProviderEvents } = await import('@openfeature/web-sdk');
  const { OFREPWebProvider } = await import('@openfeature/ofrep-web-provider');
  const how = {
    once: { changeDetection: 'none' },
    poll: { changeDetection: 'polling', pollInterval: 50 },
    stream: { changeDetection: 'sse' },
  }[mode];
  const client = OpenFeature.getClient();
  await OpenFeature.setContext(context);
  await OpenFeature.setProviderAndWait(new OFREPWebProvider({ ...options, cacheMode: 'disabled', ...how }));
  for (const event of [ProviderEvents.ConfigurationChanged, ProviderEvents.Stale, ProviderEvents.Error]) {
    client.addHandler(event, (what) => {
      say({ event, flags: what.flagsChanged, details: client.getBooleanDetails(FLAG, false), statuses });
    });
  }
  return () => client.getBooleanDetails(FLAG, false);
}

const evaluate = await (mode === 'server' ? serverSide() : webSide());
say({ event: 'ready', details: await evaluate(), statuses });
for await (const line of createInterface({ input: process.stdin })) {
  if (line === 'ask') say({ event: 'asked', details: await evaluate(), statuses });
}
process.exit(0);
