// Every call of npm's dicomweb-client: `MODULES URL` stores the files named on standard input (a JSON array), asks for
// them in all ways, and prints one JSON object. The client is made for browsers: it gets the part of XMLHttpRequest that it
// uses from fetch.
'use strict';

const fs = require('fs');
const path = require('path');

global.XMLHttpRequest = class {
  constructor() {
    this.readyState = 0;
    this.responseType = '';
    this._headers = {};
  }
  open(method, url) {
    this._method = method;
    this._url = url;
  }
  setRequestHeader(name, value) {
    this._headers[name] = value;
  }
  getResponseHeader(name) {
    return this._answer.headers.get(name);
  }
  getAllResponseHeaders() {
    return [...this._answer.headers].map(([name, value]) => `${name}: ${value}\r\n`).join('');
  }
  async send(body) {
    this._answer = await fetch(this._url, { method: this._method, headers: this._headers, body });
    this.status = this._answer.status;
    const bytes = await this._answer.arrayBuffer();
    const text = () => Buffer.from(bytes).toString('utf8');
    if (this.responseType === 'arraybuffer') this.response = bytes;
    else this.response = this.responseType === 'json' && bytes.byteLength ? JSON.parse(text()) : text();
    this.readyState = 4;
    this.onreadystatechange();
  }
};

const [modules, url] = process.argv.slice(2);
const { api } = require(path.join(modules, 'dicomweb-client'));
const exact = (buffer) => buffer.buffer.slice(buffer.byteOffset, buffer.byteOffset + buffer.byteLength);
const hex = (data) => Buffer.from(data).toString('hex');
const uid = (object, tag) => object[tag].Value[0];

// A client that notes the calls made of it by its caller, not those that it makes itself.
function noted(client, called) {
  const get = (target, name) => {
    const value = target[name];
    if (typeof value !== 'function') return value;
    return (...given) => {
      called.add(name);
      return value.apply(target, given);
    };
  };
  return new Proxy(client, { get });
}

async function main() {
  const datasets = JSON.parse(fs.readFileSync(0, 'utf8')).map((file) => exact(fs.readFileSync(file)));
  const called = new Set();
  const client = noted(new api.DICOMwebClient({ url, verbose: false }), called);
  const told = {};
  client.setDebug(false);
  client.setVerbose(false);
  told.said = [client.getDebug(), client.getVerbose()];
  await client.storeInstances({ datasets });
  const studies = await client.searchForStudies({ queryParams: { PatientID: 'P*' } });
  const studyInstanceUID = uid(studies[0], '0020000D');
  const series = await client.searchForSeries({ studyInstanceUID });
  const seriesInstanceUID = uid(series[0], '0020000E');
  const instances = await client.searchForInstances({ studyInstanceUID, seriesInstanceUID });
  const sopInstanceUID = uid(instances[0], '00080018');
  const study = { studyInstanceUID };
  const one = { ...study, seriesInstanceUID };
  const it = { ...one, sopInstanceUID };
  told.found = [studies.length, series.length, instances.length];
  told.nothing = await client.searchForStudies({ queryParams: { PatientID: 'NOBODY' } });
  told.sop = sopInstanceUID;
  told.metadata = [
    (await client.retrieveStudyMetadata(study)).length,
    (await client.retrieveSeriesMetadata(one)).length,
  ];
  const metadata = (await client.retrieveInstanceMetadata(it))[0];
  told.modality = uid(metadata, '00080060');
  told.study = (await client.retrieveStudy(study)).map(hex);
  told.series = (await client.retrieveSeries(one)).map(hex);
  told.instance = hex(await client.retrieveInstance(it));
  told.frames = (await client.retrieveInstanceFrames({ ...it, frameNumbers: [1] })).map(hex);
  told.bulk = (await client.retrieveBulkData({ BulkDataURI: metadata['7FE00010'].BulkDataURI })).map(hex);
  const jpeg = { mediaTypes: [{ mediaType: 'image/jpeg' }] };
  const images = [
    await client.retrieveInstanceRendered({ ...it, ...jpeg }),
    await client.retrieveInstanceThumbnail({ ...it, ...jpeg }),
    await client.retrieveInstanceFramesRendered({ ...it, ...jpeg, frameNumbers: [1] }),
    await client.retrieveInstanceFramesThumbnail({ ...it, ...jpeg, frameNumbers: [1] }),
  ];
  told.images = images.map((image) => hex(Array.isArray(image) ? image[0] : image).slice(0, 4));
  const wado = noted(new api.DICOMwebClient({ url: new URL('/', url).href.slice(0, -1), verbose: false }), called);
  const plain = wado.buildInstanceWadoURIUrl({ ...it, transferSyntax: '1.2.840.10008.1.2.1' });
  told.wado = hex(await (await fetch(plain.replace('?', 'wado?').replace(/([0-9])wado/, '$1/wado'))).arrayBuffer());
  told.missing = await client.retrieveStudyMetadata({ studyInstanceUID: '1.2.3' }).catch((error) => error.status);
  const ours = (name) => name !== 'constructor' && !name.startsWith('_');
  told.offered = Object.getOwnPropertyNames(api.DICOMwebClient.prototype).filter(ours).sort();
  told.called = [...called].sort();
  process.stdout.write(JSON.stringify(told));
}

main().catch((error) => {
  process.stderr.write(`${error.stack} ${error.status || ''} ${error.response || ''}\n`);
  process.exit(1);
});
